"""Tensors in `.bin` files: any part of them is what PyTorch reads, and nothing else in a file is made or run."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gpc_dist import files, pickled, tensors
from gpc_dist.errors import UserError
from gpc_dist.pickled import read_pickled

MATRIX = torch.arange(1.0, 134.0).view(7, 19)
CUBE = torch.arange(60.0).view(3, 4, 5)
VIEWS = {
    "plain": MATRIX,
    "transposed": MATRIX.t(),
    "columns": MATRIX[:, 3:9],
    "every second": MATRIX[1::2, ::3],
    "turned": CUBE.permute(2, 0, 1),
    "one row": MATRIX.t()[4:5],
    "part": CUBE[1],
    "scalar": CUBE[2, 1, 3],
    "none": MATRIX[:, :0],
    "widened": torch.arange(4).expand(1, -1),
}
"""Some share a storage, and most are not stored row by row."""


def records(path: Path) -> dict[str, bytes]:
    """Those of an archive, without the first part of their names."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def archived(path: Path, content: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, record in content.items():
            archive.writestr(f"archive/{name}", record)
    return path


def refused(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_pickled(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("own_zip", [False, True])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", VIEWS)
def test_any_flat_part_of_any_view_is_read(
    name: str, target: torch.dtype, own_zip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "_CHUNK_BYTES", 64)
    torch.save(VIEWS, tmp_path / "x.bin")
    if own_zip:  # records then begin anywhere
        archived(tmp_path / "x.bin", records(tmp_path / "x.bin"))
    stored = read_pickled(tmp_path / "x.bin")[name]
    right = VIEWS[name]
    assert (stored.shape, stored.dtype) == (tuple(right.shape), right.dtype)
    assert torch.equal(stored.mapped(), right)
    assert torch.equal(stored.loaded(), right)
    flat = right.reshape(-1)
    for start in {0, 1, len(flat) // 3, max(0, len(flat) - 1)}:
        for end in {start, start + 1, (start + len(flat)) // 2, len(flat)}:
            part = torch.empty(max(0, min(end, len(flat)) - start), dtype=target)
            stored.read(start, part)
            assert torch.equal(part, flat[start : start + len(part)].to(target))


def test_what_is_stored_row_by_row_is_a_view_of_the_file_as_it_is(tmp_path: Path) -> None:
    torch.save(VIEWS, tmp_path / "x.bin")
    found = read_pickled(tmp_path / "x.bin")
    assert {name for name, place in found.items() if place.strides is not None} == {
        "transposed",
        "columns",
        "every second",
        "turned",
    } | ({"one row"} if VIEWS["one row"].stride(1) != 1 else set())
    size = (tmp_path / "x.bin").stat().st_size
    assert {found[name].mapped().untyped_storage().nbytes() for name in ("plain", "transposed")} == {size}
    storage = MATRIX.numpy().tobytes()
    assert (tmp_path / "x.bin").read_bytes()[found["plain"].offset :].startswith(storage)
    assert found["transposed"].offset == found["plain"].offset


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ],
)
def test_every_type_is_read_as_pytorch_reads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.save({"a": torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)}, tmp_path / "x.bin")
    found, right = (
        read_pickled(tmp_path / "x.bin")["a"],
        torch.load(tmp_path / "x.bin", weights_only=True)["a"],
    )
    assert found.dtype == dtype
    assert torch.equal(found.loaded(), right)


def test_a_modules_state_is_read_with_its_ties(tmp_path: Path) -> None:
    module = nn.ModuleDict({"a": nn.Linear(3, 2), "norm": nn.BatchNorm1d(2)})
    module["b"] = nn.Linear(3, 2)
    module["b"].weight = module["a"].weight
    for state in (module.state_dict(), dict(module.named_parameters(remove_duplicate=False))):
        torch.save(state, tmp_path / "x.bin")
        found = read_pickled(tmp_path / "x.bin")
        assert list(found) == list(state)
        assert all(torch.equal(found[name].loaded(), value) for name, value in state.items())
        assert found["a.weight"].offset == found["b.weight"].offset


def test_an_archive_of_old_versions_is_read(tmp_path: Path) -> None:
    """As of PyTorch 1.6: without a byte order and a version of the layout."""
    torch.save({"a": MATRIX}, tmp_path / "x.bin")
    old = {name: content for name, content in records(tmp_path / "x.bin").items() if not name.startswith(".")}
    old.pop("byteorder")
    old["version"] = b"3\n"
    archived(tmp_path / "x.bin", old)
    assert torch.equal(read_pickled(tmp_path / "x.bin")["a"].mapped(), MATRIX)


class Trap:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return pytest.fail, ("the file was unpickled",)


def with_attribute() -> Tensor:
    tensor = torch.zeros(2)
    tensor.note = Trap()  # type: ignore[attr-defined]
    return tensor


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.zeros(2), "trap": Trap()}, "holds more than plain tensors"),
        ({"a": with_attribute()}, r"\(torch._tensor._rebuild_from_type_v2\)"),
        ({"a": np.zeros(2)}, "holds more than plain tensors"),
        ({"a": torch.zeros(2).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, r"\(torch.ComplexFloatStorage\)"),
        ({"a": torch.zeros(2, device="meta")}, "_rebuild_meta_tensor_no_storage"),
        ({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, "more than plain tensors"),
        ({"a": bytearray(9)}, r"\(_*builtin.*bytearray\)"),
        ({"a": {1, 2}}, "more than plain tensors"),
        ({"a": torch._neg_view(torch.ones(2))}, "'a' is no plain tensor"),
        ({"epoch": 3, "model": {"a": torch.zeros(2)}}, "'epoch' is no plain tensor"),
        ({1: torch.zeros(2)}, "holds no table of tensors"),
        ([torch.zeros(2)], "holds no table of tensors"),
        (torch.zeros(2), "holds no table of tensors"),
        (nn.Linear(2, 2), "holds more than plain tensors"),
    ],
)
def test_what_is_no_plain_tensor_is_refused_before_it_is_made(
    content: Any, message: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "x.bin")
    refused(tmp_path / "x.bin", message)


def test_the_format_before_pytorch_1_6_is_refused_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    torch.save({"a": MATRIX}, file, _use_new_zipfile_serialization=False)
    refused(
        file, r"before 1.6.*write it anew in Python, with torch.save\(torch.load\(FILE, weights_only=True\)"
    )
    torch.save(torch.load(file, weights_only=True), file)
    assert torch.equal(read_pickled(file)["a"].loaded(), MATRIX)


def deflated(path: Path) -> None:
    archived(path, records(path), zipfile.ZIP_DEFLATED)


def without_a_storage(path: Path) -> None:
    archived(path, {name: content for name, content in records(path).items() if name != "data/0"})


def without_a_table(path: Path) -> None:
    archived(path, {name: content for name, content in records(path).items() if name != "data.pkl"})


def with_a_short_storage(path: Path) -> None:
    archived(path, {n: c[:-4] if n == "data/0" else c for n, c in records(path).items()})


def of_the_other_order(path: Path) -> None:
    archived(path, records(path) | {"byteorder": b"big"})


def with_a_large_table(path: Path) -> None:
    archived(path, records(path) | {"data.pkl": bytes(files.SMALL_BYTES + 1)})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_front(path: Path) -> None:
    path.write_bytes(path.read_bytes()[64:])


def with_moved_records(path: Path) -> None:
    """What stands in the directory is right, and there is something else."""
    content = bytearray(path.read_bytes())
    place = content.index(b"/data/0")
    content[place + 6] = ord("9")
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (deflated, "is compressed, and PyTorch compresses nothing"),
        (without_a_storage, "storage 0 is missing"),
        (without_a_table, "it has no data.pkl"),
        (with_a_short_storage, "storage 0 is missing, or of another size"),
        (of_the_other_order, "another order of bytes"),
        (with_a_large_table, "its table of tensors would take 8388609 bytes"),
        (cut, "is damaged"),
        (cut_in_front, "its begin is cut off"),
        (with_moved_records, "data/0 is not where the directory says"),
    ],
)
def test_what_is_not_whole_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    torch.save({"a": MATRIX}, tmp_path / "x.bin")
    change(tmp_path / "x.bin")
    refused(tmp_path / "x.bin", message)


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x02tQ"
"""The persistent id of storage `0`, of two numbers."""


@pytest.mark.parametrize(
    ("table", "message"),
    [
        # a place in the memo beyond all others takes memory for those between
        (b"}r\xff\xff\xff\x7f", "has a number that is too large"),
        # tuples in each other as a key: their hash goes as deep
        (b"}()" + b"\x85" * 50_000 + b"Nu", "a table of more than 13,333 tensors"),
        (b"cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R", r"\(builtins.bytearray\)"),
        (b"\x8e" + bytes(8), "pickled with BINBYTES8"),
        (b"cos\nsystem\nX\x01\0\0\0x\x85R", r"\(os.system\)"),
        (REBUILD + b"N}\x86b", "a state for what has none"),
        (REBUILD + b")R", "TypeError in its table of tensors"),
        (b"ccollections\nOrderedDict\n]\x85R", "TypeError in its table of tensors"),
        (b"}X\x01\0\0\0a" + STORAGE + b"s", "'a' is no plain tensor"),
        (b"}X\x01\0\0\0aX\x01\0\0\0bQs", "in its table of tensors"),
        (b"}X\x01\0\0\0a" + REBUILD + b"(" + STORAGE + b"K\0K\x02\x85K\x01\x85\x89Nt" + b"Rs", None),
        (
            b"}X\x01\0\0\0a" + REBUILD + b"(" + STORAGE + b"K\x01K\x02\x85K\x01\x85\x89NtRs",
            "more numbers than",
        ),
        (b"}X\x01\0\0\0a" + REBUILD + b"(" + STORAGE + b"K\0K\x03\x85K\0\x85\x89NtRs", "more numbers than"),
        (
            b"}X\x01\0\0\0a" + REBUILD + b"(" + STORAGE + b"K\0J\xff\xff\xff\xff\x85K\x01\x85\x89NtRs",
            "'a' has no shape",
        ),
        (b"}X\x01\0\0\0a" + REBUILD + b"(" + STORAGE + b"K\0K\x02\x85)\x89NtRs", "'a' has no shape"),
        (b"}X\x01\0\0\0a" + REBUILD + b"(" + STORAGE + b"K\0K\x02K\x01\x89NtRs", "'a' has no shape"),
        (
            b"}X\x01\0\0\0a"
            + REBUILD
            + b"("
            + STORAGE
            + b"K\0K\0J\0\0\0\x7fJ\0\0\0\x7f\x87K\x01K\x01K\x01\x87\x89NtRs",
            "the shape of 'a' is too large",
        ),
    ],
)
def test_a_table_that_others_wrote_takes_no_more_than_its_bytes(
    table: bytes, message: str | None, tmp_path: Path
) -> None:
    numbers = np.array([1.5, -2.0], dtype="<f4").tobytes()
    file = archived(tmp_path / "x.bin", {"data.pkl": b"\x80\x02" + table + b".", "data/0": numbers})
    if message:
        refused(file, message)
    else:
        assert read_pickled(file)["a"].loaded().tolist() == [1.5, -2.0]


def test_one_number_does_not_stand_for_many(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(2**40)}, tmp_path / "x.bin")
    refused(tmp_path / "x.bin", "'a' stands for more numbers than are stored")


def test_a_directory_of_many_records_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": MATRIX}, tmp_path / "x.bin")
    monkeypatch.setattr(pickled, "SMALL_BYTES", 100)
    refused(tmp_path / "x.bin", "its directory would take")


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "pipe", "no file"),
        (tmp_path, "a directory"),
        (tmp_path / "x", "No such file"),
    ):
        with pytest.raises(UserError, match=f"cannot read {path}: .*{reason}"):
            read_pickled(path)


def test_a_file_that_becomes_shorter_is_named(tmp_path: Path) -> None:
    torch.save({"a": MATRIX.t()}, tmp_path / "x.bin")
    place = read_pickled(tmp_path / "x.bin")["a"]
    os.truncate(tmp_path / "x.bin", place.offset + 8)
    with pytest.raises(UserError, match="became shorter"):
        place.loaded()


def test_an_encrypted_archive_is_refused_in_a_line(tmp_path: Path) -> None:
    file = tmp_path / "encrypted.bin"
    torch.save({"a": MATRIX}, file)
    content = bytearray(file.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(signature)
        while at >= 0:
            content[at + flags] |= 1
            at = content.find(signature, at + 1)
    file.write_bytes(content)
    with pytest.raises(UserError, match="is damaged .*encrypted"):
        read_pickled(file)
