"""Files of pickled weights: what is read from them is what PyTorch reads, or they are refused."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, example, given
from hypothesis import strategies as st
from torch import Tensor

from gpc_dist.errors import UserError
from gpc_dist.pickled import read_pickled
from tests.fuzz.conftest import FUZZ, judged
from tests.fuzz.mutations import changed_bytes

_MATRIX = torch.arange(12.0).view(3, 4)
TENSORS = {
    "encoder.layer.0.weight": _MATRIX,
    "encoder.layer.1.weight": _MATRIX.t(),
    "encoder.layer.0.bias": _MATRIX[1],
    "table": torch.arange(8, dtype=torch.bfloat16).view(4, 2),
    "count": torch.tensor(7),
    "none": torch.zeros(0, 5),
}


def saved(tensors: Any) -> bytes:
    content = io.BytesIO()
    torch.save(tensors, content)
    return content.getvalue()


FILE = saved(TENSORS)
with zipfile.ZipFile(io.BytesIO(FILE)) as _archive:
    RECORDS = {name: _archive.read(name) for name in _archive.namelist()}
TABLE = "archive/data.pkl"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "first.bin").write_bytes(FILE)
    read_pickled(folder / "first.bin")["table"].loaded()  # imports are not what is measured
    return folder / "pytorch_model.bin"


def values(path: Path) -> dict[str, Tensor]:
    return {name: place.loaded() for name, place in read_pickled(path).items()}


def expected(path: Path) -> Any:
    """As PyTorch reads the file; None if it does not."""
    try:
        return torch.load(path, weights_only=True)
    except Exception:
        return None


def same(found: Tensor, right: Tensor) -> bool:
    """To the bit, for there may be values that are no numbers."""
    bits = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (found, right)]
    return found.dtype == right.dtype and found.shape == right.shape and torch.equal(*bits)


def check(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    found = judged(lambda: values(path))
    event("refused" if isinstance(found, UserError) else "read")
    if isinstance(found, dict):
        right = expected(path)
        # PyTorch asks for records that hold nothing of the tensors, such as a version
        assert right is None or found.keys() == right.keys()
        assert right is None or all(same(found[name], tensor.detach()) for name, tensor in right.items())
    else:
        assert str(path) in str(found)


def archive(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as made:
        for name, record in records.items():
            made.writestr(name, record)
    return content.getvalue()


@FUZZ
@given(table=changed_bytes(RECORDS[TABLE]))
@example(table=RECORDS[TABLE])
def test_tables_that_changed(path: Path, table: bytes) -> None:
    check(path, archive(RECORDS | {TABLE: table}))


@FUZZ
@given(content=changed_bytes(FILE))
def test_bytes_that_changed(path: Path, content: bytes) -> None:
    check(path, content)


@FUZZ
@given(directory=changed_bytes(FILE[-700:]))
def test_directories_that_changed(path: Path, directory: bytes) -> None:
    check(path, FILE[:-700] + directory)


@FUZZ
@given(
    name=st.sampled_from(sorted(RECORDS)),
    record=st.none() | st.binary(max_size=60),
    compression=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
)
def test_records_of_other_things(path: Path, name: str, record: bytes | None, compression: int) -> None:
    changed = {key: content for key, content in RECORDS.items() if key != name}
    check(path, archive(changed if record is None else changed | {name: record}, compression))


TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=4) | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@FUZZ
@given(tree=TREES, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_pickles_of_other_things(path: Path, tree: Any, protocol: int) -> None:
    check(path, archive(RECORDS | {TABLE: pickle.dumps(tree, protocol)}))


@FUZZ
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=5),
    dtype=st.sampled_from(
        [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
    ),
    turned=st.booleans(),
)
def test_what_pytorch_writes_is_read(
    path: Path, shapes: list[list[int]], dtype: torch.dtype, turned: bool
) -> None:
    tensors = {f"t{i}": (torch.rand(shape) * 9).to(dtype) for i, shape in enumerate(shapes)}
    if turned:
        tensors = {
            name: tensor.permute(tuple(reversed(range(tensor.dim())))) for name, tensor in tensors.items()
        }
    path.write_bytes(saved(tensors))
    found = read_pickled(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name].loaded(), tensor) for name, tensor in tensors.items())
    check(path, path.read_bytes())
