"""The judge of readers: what it lets pass, and what it does not."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpc_dist.errors import MachineError, UserError
from tests.fuzz import conftest
from tests.fuzz.conftest import judged


def refuse(error: Exception) -> Callable[[], Any]:
    def read() -> None:
        raise error

    return read


def busy() -> None:
    begun_s = time.process_time()
    while time.process_time() < begun_s + conftest.MOST_CPU_S:
        pass


def test_content_and_refusals_pass() -> None:
    assert judged(lambda: 3) == 3
    for error in (UserError("x is no file: give one"), MachineError("the disk is full")):
        assert judged(refuse(error)) is error


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (refuse(KeyError("task")), "KeyError, not an error of this program: 'task'"),
        (refuse(RecursionError("too deep")), "RecursionError, not an error"),
        (refuse(UserError("one\ntwo")), "more than a line"),
        (refuse(UserError(" ")), "without a word"),
        (lambda: len(b"x" * (300 * 2**20)), "it took 3.. MiB"),
        (lambda: torch.ones(80 * 2**20) is None, "it took 3.. MiB"),
        (busy, r"it took 0\.. s"),
    ],
)
def test_all_else_does_not(monkeypatch: pytest.MonkeyPatch, read: Callable[[], Any], message: str) -> None:
    monkeypatch.setattr(conftest, "MOST_CPU_S", 0.3 if read is busy else 60.0)
    with pytest.raises(AssertionError, match=message):
        judged(read)


def test_memory_of_python_is_measured_where_the_processs_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(conftest._Memory, "_FORGET", tmp_path / "no" / "such")
    assert judged(lambda: 3) == 3
    with pytest.raises(AssertionError, match=r"it took 3.. MiB"):
        judged(lambda: len(b"x" * (300 * 2**20)))
