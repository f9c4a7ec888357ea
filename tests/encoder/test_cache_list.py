"""`gpc-dist cache`."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from gpc_dist.encoder.state_cache import INDEX, NAMES
from tests.conftest import gpc

from .test_state_cache import KEY, written


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPC_DIST_CACHE", str(tmp_path / "states"))
    return tmp_path / "states"


def test_caches_are_listed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpc("cache") == 0
    assert capsys.readouterr().out.strip() == f"no text states are cached in {root}"
    whole, half = written(root)[0].folder, written(root, "bfloat16")[0].folder
    (half / INDEX).write_text("{")
    days_ago = time.time() - 3 * 86400
    os.utime(whole / INDEX, (days_ago, days_ago))
    assert gpc("cache") == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith(KEY.folder))
    assert re.split(r"\s{2,}", line) == [
        KEY.folder,
        "bert",
        "2",
        "4",
        "float32, all tokens",
        "0.0",
        "3.0 days ago",
    ]
    assert re.search(rf"{half.name}\s+damaged", said)
    assert f"2 caches in {root}" in said


def test_caches_are_removed_by_name_and_by_age(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = written(root)[0].folder, written(root, "bfloat16")[0].folder
    foreign = new / "notes.txt"
    foreign.write_text("mine")
    days_ago = time.time() - 3 * 86400
    os.utime(old / INDEX, (days_ago, days_ago))
    assert gpc("cache", "--older-than", 4) == 0
    assert old.exists()
    assert gpc("cache", "--older-than", 2) == 0
    assert (old.exists(), new.exists()) == (False, True)
    assert "1 caches removed" in capsys.readouterr().out
    assert gpc("cache", "--remove", new.name) == 0
    assert [path for path in new.iterdir() if path.name in NAMES] == []
    assert foreign.read_text() == "mine"
    assert gpc("cache", "--remove", new.name) == 2
    assert f"has no cache {new.name}" in capsys.readouterr().err
    written(root)
    assert gpc("cache", "--remove", "all") == 0
    assert not old.exists()
