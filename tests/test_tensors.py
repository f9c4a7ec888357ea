"""Tensors in safetensors files: any part of them is read, and what is not whole is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpc_dist import files, tensors
from gpc_dist.errors import UserError
from gpc_dist.tensors import check_like, read_header, read_headers


def entry(start: int, end: int, dtype: str = "F32", shape: Any = None) -> dict[str, Any]:
    """Of a header: by default, a vector of 4-byte numbers."""
    return {
        "dtype": dtype,
        "shape": [(end - start) // 4] if shape is None else shape,
        "data_offsets": [start, end],
    }


def written(path: Path, header: Any, data: bytes) -> Path:
    """A file with a header (JSON, or its bytes) and what follows it."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + data)
    return path


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float64])
def test_any_flat_part_is_read_in_any_type(
    target: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "_CHUNK_BYTES", 64)  # several chunks, the last one short
    matrix = torch.randn(7, 19)
    save_file({"a": torch.zeros(3), "b": matrix}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")["b"]
    for start, length in ((0, 133), (5, 60), (132, 1), (40, 0)):
        part = torch.empty(length, dtype=target)
        stored.read(start, part)
        assert torch.equal(part, matrix.flatten()[start : start + length].to(target))


def test_a_stream_is_written_as_the_library_reads_it(tmp_path: Path) -> None:
    flat = torch.randn(50)
    made = {"part": flat[7:19], "turned": torch.randn(3, 4).t(), "half": torch.ones(2).bfloat16()}
    made |= {"scalar": torch.tensor(3.0), "empty": flat[:0]}
    tensors.write_stream(tmp_path / "x.safetensors", tensors.stream(made))
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == made.keys()
    assert all(torch.equal(found[name], values.float()) for name, values in made.items())
    assert read_header(tmp_path / "x.safetensors")["turned"].shape == (4, 3)


def test_pieces_are_read_as_the_whole(tmp_path: Path) -> None:
    flat = torch.randn(20)
    parts = []
    for number, piece in enumerate(flat.split([6, 0, 9, 5])):
        save_file({"x": piece.clone()}, tmp_path / str(number))
        parts.append(read_header(tmp_path / str(number)))
    whole = tensors.joined(parts)["x"]
    assert (whole.shape, whole.dtype) == ((20,), torch.float32)
    for start, length in ((0, 20), (3, 2), (5, 2), (4, 12), (15, 5), (9, 0)):
        part = torch.empty(length)
        whole.read(start, part)
        assert torch.equal(part, flat[start : start + length])


@pytest.mark.parametrize("dtype", sorted(tensors._DTYPES))
def test_every_type_is_read_as_the_library_reads_it(tmp_path: Path, dtype: str) -> None:
    kind = tensors._DTYPES[dtype]
    data = bytes(range(1, 7)) if kind != torch.bool else bytes([0, 1, 1, 0, 1, 0])
    header = {"pad": entry(0, 3, "U8", [3]), "a": entry(3, 3 + 6 * kind.itemsize, dtype, [2, 3])}
    path = written(tmp_path / "x", header, b"pad" + data * kind.itemsize)
    found = read_header(path)["a"]
    assert (found.shape, found.dtype, found.type_name) == ((2, 3), kind, dtype)
    if dtype != "F8_E8M0":  # torch's reader of safetensors does not know it
        expected = load_file(path)["a"]
        for values in (found.loaded(), found.mapped()):
            assert values.dtype == expected.dtype
            assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))


def test_a_tensor_at_an_odd_place_is_read(tmp_path: Path) -> None:
    data = b"\0" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    path = written(tmp_path / "x", {"a": entry(1, 9), "pad": entry(0, 1, "U8", [1])}, data)
    assert read_header(path)["a"].mapped().tolist() == [1.5, -2.0]


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(UserError, match="both hold 'x'"):
        read_headers(sorted(tmp_path.iterdir()))


A, B = entry(0, 8), entry(8, 16)
TWICE = b'{"a": %s, "a": %s}' % (json.dumps(A).encode(), json.dumps(entry(0, 8, shape=[2, 1])).encode())


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": entry(4, 12), "b": entry(12, 20)}, 20, "invalid offset"),
        ({"a": A, "b": entry(4, 12)}, 16, "invalid offset"),
        ({"a": A, "b": A}, 8, "invalid offset"),
        ({"a": A, "b": entry(12, 20)}, 20, "invalid offset"),
        ({"a": A, "b": B}, 20, "not fully covered"),
        ({"a": A, "b": B}, 12, "not fully covered"),
        ({"a": entry(8, 0)}, 8, "damaged"),
        ({"a": entry(0, 8, "F64")}, 8, "shape, data type, or offset"),
        ({"a": entry(0, 8, "F33")}, 8, "unknown variant"),
        ({"a": entry(0, 8, shape=[-2])}, 8, "integer `-2`"),
        ({"a": entry(0, 8, shape=[2.0])}, 8, "floating point"),
        ({"a": entry(0, 8, shape=[2**40, 2**40])}, 8, "overflow"),
        ({"a": entry(0, 8, "F4", [16])}, 8, "has type F4, which is not supported"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "missing field"),
        ({"a": None}, 8, "damaged"),
        (TWICE, 8, "duplicate key 'a'"),
        (b'{"\xff": 1}', 0, "UTF-8"),
        (b"[" * 100_000, 0, "damaged"),
        (b"", 0, "damaged"),
    ],
)
def test_a_header_that_does_not_cover_the_file_once_is_refused(
    tmp_path: Path, header: Any, size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_header(written(tmp_path / "x", header, bytes(size)))
    assert str(tmp_path / "x") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_size_of_a_header_takes_no_memory(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.write((2**30).to_bytes(8, "little"))
        file.truncate(2**31)
    with pytest.raises(UserError, match="its header would take 1073741824 bytes"):
        read_header(tmp_path / "x")


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "pipe", "no file"),
        (tmp_path, "a directory"),
        (tmp_path / "x", "No such file"),
    ):
        with pytest.raises(UserError, match=f"cannot read {path}: .*{reason}"):
            read_header(path)
        with pytest.raises(UserError, match=f"cannot read {path}: .*{reason}"):
            files.read_small_json(path)


def test_json_larger_than_anybody_writes_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_text(" " * files.SMALL_BYTES + "1")
    with pytest.raises(UserError, match="is larger than 8 MiB"):
        files.read_small_json(tmp_path / "x")
    (tmp_path / "x").write_text(" " * (files.SMALL_BYTES - 1) + "1")
    assert files.read_small_json(tmp_path / "x") == 1


def test_tensors_are_compared_before_they_are_read() -> None:
    found = {"a": torch.zeros(2, 3), "step": torch.tensor(4)}
    check_like(found, {"a": (2, 3), "step": ()})
    for wanted, message in (
        ({"a": (2, 3)}, "it holds 'step'"),
        ({"a": (2, 3), "step": (), "b": ()}, "it lacks 'b'"),
        ({"a": (3, 2), "step": ()}, r"'a' has shape \[2, 3\], not \[3, 2\]"),
    ):
        with pytest.raises(UserError, match=message):
            check_like(found, wanted)
    with pytest.raises(UserError, match=r"'a' holds torch\.int8"):
        check_like({"a": torch.zeros(2, 3, dtype=torch.int8)}, {"a": (2, 3)})


def test_a_file_that_cannot_be_written_is_an_error_of_the_system(tmp_path: Path) -> None:
    """The library has one of its own, which nobody would take for a full disk."""
    with pytest.raises(FileNotFoundError) as caught:
        tensors.save_file({"a": torch.zeros(3)}, tmp_path / "missing" / "file")
    assert caught.value.filename == str(tmp_path / "missing" / "file")
