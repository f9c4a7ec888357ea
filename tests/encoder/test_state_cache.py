"""Text states in files: what was written is read, and nothing else is taken for it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gpc_dist.encoder.state_cache import (
    CHECKSUMS,
    INDEX,
    STATES,
    CachedStates,
    Layout,
    StatesKey,
    StatesWriter,
    default_root,
    filling,
    is_complete,
    new_cache,
    read_index,
)
from gpc_dist.errors import UserError
from gpc_dist.locks import TakenError, hold

LENGTHS = np.array([3, 1, 5, 2])
H = 6
KEY = StatesKey("bert", "ab" * 32, 2, "", "float32", "none", H, "cd" * 32)


def written(root: Path, dtype: str = "float32") -> tuple[CachedStates, Tensor]:
    """A cache that two writers have filled, and its states, `[R, T, H]`."""
    key = replace(KEY, dtype=dtype)
    layout = Layout(LENGTHS, H, dtype)
    states = torch.randn(4, 5, H, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    with new_cache(root, key, layout) as folder:
        for rows in ([2, 0], [1, 3]):
            with StatesWriter(folder, layout) as writer:
                writer.write(np.array(rows), states[rows])
        assert not is_complete(root / key.folder)
    return CachedStates(root / key.folder, key, layout), states


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_read_as_they_were_written(tmp_path: Path, dtype: str) -> None:
    cached, states = written(tmp_path, dtype)
    found = cached.padded(np.array([3, 2, 3]), 7)
    assert found.dtype == getattr(torch, dtype)
    assert found.shape == (3, 7, H)
    for place, row in enumerate([3, 2, 3]):
        assert torch.equal(found[place, : LENGTHS[row]], states[row, : LENGTHS[row]])
        assert not found[place, LENGTHS[row] :].any()
    assert cached.padded(np.array([], dtype=np.int64), 0).shape == (0, 0, H)
    assert cached.bytes == (tmp_path / cached.folder / STATES).stat().st_size == 11 * H * found.itemsize


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_row_with_a_flipped_bit_is_not_read(tmp_path: Path) -> None:
    cached, states = written(tmp_path)
    flip(cached.folder / STATES, 3 * H * 4 + 1)  # in row 1
    again = CachedStates(cached.folder, KEY, Layout(LENGTHS, H, "float32"))
    assert torch.equal(again.padded(np.array([0]), 3)[0], states[0, :3])
    with pytest.raises(
        UserError, match=rf"row 1 is not what was written.*gpc-dist cache --remove {KEY.folder}"
    ):
        again.padded(np.array([0, 1]), 3)


def shorten(folder: Path) -> None:
    with (folder / STATES).open("r+b") as file:
        file.truncate(11 * H * 4 - 1)


def change_index(folder: Path, **values: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["key"] |= values
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shorten, "a file is not the one that was written"),
        (lambda folder: flip(folder / CHECKSUMS, 5), "a file is not the one that was written"),
        (lambda folder: (folder / CHECKSUMS).unlink(), "No such file"),
        (lambda folder: (folder / STATES).write_bytes(b""), "empty"),
        (lambda folder: change_index(folder, first_layer=3), "its index is another's"),
        (lambda folder: change_index(folder, first_layer="x"), "first_layer"),
        (lambda folder: (folder / INDEX).write_text('{"format": 9}'), "index.json"),
    ],
)
def test_a_damaged_cache_is_refused(tmp_path: Path, damage: Callable[[Path], object], said: str) -> None:
    folder = written(tmp_path)[0].folder
    damage(folder)
    with pytest.raises(UserError, match=said):
        CachedStates(folder, KEY, Layout(LENGTHS, H, "float32"))


def test_a_cache_of_other_rows_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path)[0].folder
    with pytest.raises(UserError, match="its index is another's"):
        CachedStates(folder, KEY, Layout(LENGTHS + 1, H, "float32"))


def test_the_same_weights_in_another_place_have_the_same_cache(tmp_path: Path) -> None:
    folder = written(tmp_path)[0].folder
    moved = replace(KEY, encoder="elsewhere/bert")
    CachedStates(folder, moved, Layout(LENGTHS, H, "float32"))
    for name, value in {
        "encoder_sha256": "00",
        "first_layer": 1,
        "pooling": "mean",
        "quantize": "int8",
    }.items():
        assert replace(KEY, **{name: value}).folder != KEY.folder


def test_a_cache_that_was_not_filled_is_not_there(tmp_path: Path) -> None:
    layout = Layout(LENGTHS, H, "float32")
    with pytest.raises(KeyboardInterrupt), new_cache(tmp_path, KEY, layout) as folder:
        assert folder.is_dir()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    assert not is_complete(tmp_path / KEY.folder)


def test_one_process_fills_a_cache_at_a_time(tmp_path: Path) -> None:
    with filling(tmp_path / "root", KEY):
        (lock,) = (tmp_path / "root").iterdir()
        with pytest.raises(TakenError), hold(lock, timeout_s=0):
            raise AssertionError("two fill it")


def test_the_index_says_what_is_cached(tmp_path: Path) -> None:
    index = read_index(written(tmp_path)[0].folder)
    assert (index.key, index.rows, index.bytes) == (KEY, 4, 11 * H * 4)
    assert index.filled_s >= 0


def test_where_caches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("GPC_DIST_CACHE", "elsewhere")
    assert default_root() == Path("elsewhere")
    monkeypatch.delenv("GPC_DIST_CACHE")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shared = tmp_path / f"gpc-dist-cache-{os.geteuid()}"
    assert default_root() == shared / "states"
    monkeypatch.setattr("tempfile.tempdir", str(shared))  # once compiled code is kept
    assert default_root() == shared / "states"
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "gpc-dist" / "states"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root() == tmp_path / ".cache" / "gpc-dist" / "states"
