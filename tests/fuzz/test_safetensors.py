"""Files of weights: what is read from them is what the safetensors library reads, or they are refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import event, example, given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save

from gpc_dist.adapter.fingerprint import fingerprint_files, shards
from gpc_dist.errors import UserError
from gpc_dist.tensors import Stored, read_header
from tests.fuzz.conftest import FUZZ, judged
from tests.fuzz.mutations import as_json, changed_bytes, changed_tree

TENSORS = {
    "encoder.layer.0.weight": torch.arange(12.0).view(3, 4),
    "encoder.layer.0.bias": torch.arange(3.0),
    "table": torch.arange(8, dtype=torch.bfloat16).view(4, 2),
    "count": torch.tensor(7),
    "none": torch.zeros(0, 5),
}
FILE = save(TENSORS, {"format": "pt"})
_SIZE = int.from_bytes(FILE[:8], "little")
HEADER: dict[str, Any] = json.loads(FILE[8 : 8 + _SIZE])
DATA = FILE[8 + _SIZE :]

STRICTER = ("duplicate key", "which is not supported", "is too large", "nested too deeply", "would take")
"""Why a file is refused that the library reads."""
TYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E8M0",
    "F4",
    "C64",
    "I64",
    "I32",
    "I8",
    "U16",
    "U8",
    "BOOL",
    "F33",
    "",
]
SIZES = st.sampled_from([0, 1, 2, 3, 4, 12, -1, 2**40, 2**62, 2**63, 2**64])
OFFSETS = st.sampled_from([-8, -1, 0, 1, 2, 4, 8, 12, 48, 60, 76, 84, 2**31, 2**63, 2**64, 2**70])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


def file_of(header: bytes, data: bytes, size: int | None = None) -> bytes:
    return (len(header) if size is None else size).to_bytes(8, "little") + header + data


@st.composite
def placed_otherwise(draw: st.DrawFn) -> bytes:
    """A header of which a few entries are shifted, laid over others, of other types or shapes, or there twice."""
    entries = [(name, dict(entry)) for name, entry in HEADER.items()]
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(1, len(entries) - 1))  # the first is the metadata
        name, entry = entries[place]
        way = draw(st.sampled_from(["shift", "over", "place", "type", "shape", "name", "twice", "drop"]))
        start, end = entry.get("data_offsets", [0, 0])
        if way == "shift":
            by = draw(st.sampled_from([-48, -12, -8, -4, -1, 1, 4, 8, 12, 48]))
            entry["data_offsets"] = [start + by, end + by]
        elif way == "over":
            entry["data_offsets"] = draw(st.sampled_from(entries[1:]))[1].get("data_offsets")
        elif way == "place":
            entry["data_offsets"] = [draw(OFFSETS), draw(OFFSETS)]
        elif way == "type":
            entry["dtype"] = draw(st.sampled_from(TYPES))
        elif way == "shape":
            entry["shape"] = draw(
                st.lists(st.sampled_from([0, 1, 2, 3, 4, 12, -1, 2**40, 2**62, 2**63, 2**64]), max_size=4)
            )
        elif way == "name":
            entries[place] = (draw(st.sampled_from(["", "\n", "\u2028", "__metadata__", *HEADER])), entry)
        elif way == "twice":
            entries.insert(draw(st.integers(1, len(entries))), (name, dict(entry)))
        elif len(entries) > 2:
            del entries[place]
    listed = ", ".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries)
    extra = draw(st.sampled_from([b"", b"", b"\0", b"\0" * 8]))
    return file_of(f"{{{listed}}}".encode(), draw(st.sampled_from([DATA, DATA + extra, DATA[:-4]])))


def expected(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Type, shape and bytes of each tensor as the library reads them; None if it does not."""
    try:
        found = safetensors.deserialize(content)
    except SafetensorError:
        return None
    return {name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in found}


def values(stored: dict[str, Stored]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The same as this program reads them."""
    return {
        name: (place.type_name, place.shape, place.loaded().view(-1).view(torch.uint8).numpy().tobytes())
        for name, place in stored.items()
    }


def check(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    found, right = judged(lambda: values(read_header(path))), expected(content)
    sealed = judged(lambda: fingerprint_files([path]))
    event("refused" if isinstance(found, UserError) else "read")
    if isinstance(found, UserError):
        assert str(path) in str(found)
        assert right is None or any(reason in str(found) for reason in STRICTER), found
        assert isinstance(sealed, UserError)
    else:
        assert found == right
        assert isinstance(sealed, str)
        header = content[8 : 8 + int.from_bytes(content[:8], "little")]
        names = [name for name, _ in json.loads(header, object_pairs_hook=list)]
        assert len(set(names)) == len(names)


ONE = b'"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'


@FUZZ
@given(content=placed_otherwise())
@example(content=FILE)
@example(content=file_of(b"{%s, %s}" % (ONE, ONE), b"x"))
def test_tensors_that_are_placed_otherwise(path: Path, content: bytes) -> None:
    check(path, content)


@FUZZ
@given(content=changed_bytes(FILE))
def test_bytes_that_changed(path: Path, content: bytes) -> None:
    check(path, content)


@FUZZ
@given(
    tree=changed_tree(HEADER), size=st.sampled_from([None, None, None, 0, 1, 2**23, 2**32, 2**63, 2**64 - 1])
)
def test_headers_of_other_things(path: Path, tree: Any, size: int | None) -> None:
    check(path, file_of(as_json(tree), DATA, size))


@FUZZ
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=5),
    dtype=st.sampled_from(
        [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
    ),
)
def test_what_the_library_writes_is_read(path: Path, shapes: list[list[int]], dtype: torch.dtype) -> None:
    tensors = {f"t{i}": (torch.rand(shape) * 9).to(dtype) for i, shape in enumerate(shapes)}
    path.write_bytes(save(tensors))
    found = read_header(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name].loaded(), tensor) for name, tensor in tensors.items())
    check(path, path.read_bytes())


PARTS = {name: f"model-{part}.safetensors" for part, name in enumerate(TENSORS)}
INDEX = {"metadata": {"total_size": 9}, "weight_map": PARTS}


@FUZZ
@given(content=changed_bytes(as_json(INDEX)) | changed_tree(INDEX).map(as_json))
@example(content=b"[" * 100_000)
def test_indexes_of_parts(path: Path, content: bytes) -> None:
    index = path.with_name("index.json")
    index.write_bytes(content)
    found = judged(lambda: shards(index))
    if isinstance(found, UserError):
        assert str(index) in str(found)
    else:
        assert set(found) == set(json.loads(content)["weight_map"].values())


def _pickled() -> bytes:
    content = io.BytesIO()
    torch.save(TENSORS, content)
    return content.getvalue()


PICKLED = _pickled()


@FUZZ
@given(tail=changed_bytes(PICKLED[-400:]))
def test_zips_of_pickles(path: Path, tail: bytes) -> None:
    """Their fingerprint, which reads nothing but the directory at the end."""
    file = path.with_name("pytorch_model.bin")
    file.write_bytes(PICKLED[:-400] + tail)
    found = judged(lambda: fingerprint_files([file]))
    assert isinstance(found, str) or str(file) in str(found)
