"""Cached text states: what is read is what was written, or the cache is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import event, example, given
from hypothesis import strategies as st

from gpc_dist.encoder.state_cache import (
    CHECKSUMS,
    INDEX,
    NAMES,
    STATES,
    CachedStates,
    Layout,
    StatesKey,
    StatesWriter,
    new_cache,
)
from gpc_dist.errors import MachineError, UserError
from tests.fuzz.conftest import FUZZ, judged
from tests.fuzz.mutations import as_json, changed_bytes, changed_tree

LENGTHS = np.array([2, 3, 1])
KEY = StatesKey("bert", "ab" * 32, 2, "", "float32", "none", 4, "cd" * 32)
LAYOUT = Layout(LENGTHS, 4, "float32")
WRITTEN = torch.arange(36.0).view(3, 3, 4)
"""`[R, T, H]`, of which the rows have the first tokens."""
READ = torch.where(torch.arange(3)[None, :, None] < torch.from_numpy(LENGTHS)[:, None, None], WRITTEN, 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    with new_cache(root, KEY, LAYOUT) as filled, StatesWriter(filled, LAYOUT) as writer:
        writer.write(np.arange(3), WRITTEN)
    return root / KEY.folder


def check(folder: Path, name: str, content: bytes) -> None:
    """Read the cache with another content of one of its files."""
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    try:
        found = judged(lambda: CachedStates(folder, KEY, LAYOUT).padded(np.arange(3), 3))
    finally:
        (folder / name).write_bytes(before)
    if isinstance(found, UserError | MachineError):
        event("refused")
        assert f"gpc-dist cache --remove {folder.name}" in str(found)
        return
    event("read")
    assert torch.equal(found, READ)


@pytest.mark.parametrize("name", NAMES)
@FUZZ
@given(data=st.data())
def test_changed_bytes(folder: Path, name: str, data: st.DataObject) -> None:
    check(folder, name, data.draw(changed_bytes((folder / name).read_bytes())))


@FUZZ
@given(data=st.data())
def test_another_index(folder: Path, data: st.DataObject) -> None:
    index = json.loads((folder / INDEX).read_text())
    check(folder, INDEX, as_json(data.draw(changed_tree(index))))


@FUZZ
@given(content=st.binary(max_size=200))
@example(content=b"")
@example(content=b"\0" * 96)
def test_any_states_and_checksums(folder: Path, content: bytes) -> None:
    for name in (STATES, CHECKSUMS):
        check(folder, name, content)
