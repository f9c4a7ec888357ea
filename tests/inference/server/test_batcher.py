"""What runs next: within the budget, of one kind, the oldest first, and never what nobody waits for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpc_dist.inference.server.batcher import Batcher, FullError, PassError
from gpc_dist.inference.server.encoder import Row

EARLY, LATE = SimpleNamespace(prompt_tokens=2, first_layer=0), SimpleNamespace(prompt_tokens=2, first_layer=3)


def rows(*lengths: int, adapter: Any = EARLY) -> list[Row]:
    return [Row(adapter, np.full(length, length), None) for length in lengths]


class Passes:
    """Stands for the encoder: answers each row with its length. Held passes wait."""

    def __init__(self, held: bool = False) -> None:
        self.lengths: list[list[int]] = []
        self.entered, self.go = threading.Event(), threading.Event()
        if not held:
            self.go.set()

    def __call__(self, rows: Sequence[Row]) -> list[np.ndarray]:
        self.lengths.append([len(row) for row in rows])
        self.entered.set()
        assert self.go.wait(60)
        if any(len(row) == 13 for row in rows):
            raise RuntimeError("no memory")
        return [np.array([float(len(row))], np.float32) for row in rows]

    async def running(self) -> None:
        """Wait until a pass runs."""
        assert await asyncio.to_thread(self.entered.wait, 60)


async def with_work(batcher: Batcher, *asked: Any) -> list[Any]:
    work = asyncio.create_task(batcher.work())
    try:
        return list(await asyncio.gather(*asked, return_exceptions=True))
    finally:
        work.cancel()


def test_passes_keep_the_budget_and_answers_their_order() -> None:
    passes = Passes()
    batcher = Batcher(passes, batch_tokens=40, wait_s=0.0, most_rows=100)
    lengths = (3, 18, 4, 17, 3, 9, 8)
    (found,) = asyncio.run(with_work(batcher, batcher.outputs(rows(*lengths))))
    assert [float(each[0]) for each in found] == list(lengths)
    assert sorted(chain.from_iterable(passes.lengths)) == sorted(lengths)
    assert all(len(each) * (max(each) + 2) <= 40 for each in passes.lengths)
    assert 3 in passes.lengths[0]  # the first that came
    assert len(passes.lengths) < len(lengths)


def test_a_row_above_the_budget_runs_alone() -> None:
    passes = Passes()
    batcher = Batcher(passes, batch_tokens=10, wait_s=0.0, most_rows=100)
    (found,) = asyncio.run(with_work(batcher, batcher.outputs(rows(50, 50))))
    assert len(found) == 2
    assert passes.lengths == [[50], [50]]


def test_kinds_run_apart_and_the_oldest_first() -> None:
    passes = Passes()
    batcher = Batcher(passes, batch_tokens=1000, wait_s=0.0, most_rows=100)
    asked = [rows(3), rows(4, adapter=LATE), rows(5), rows(6, adapter=LATE)]
    asyncio.run(with_work(batcher, *map(batcher.outputs, asked)))
    assert [sorted(each) for each in passes.lengths] == [[3, 5], [4, 6]]


def test_there_is_room_for_so_many_rows() -> None:
    batcher = Batcher(Passes(), batch_tokens=10, wait_s=0.0, most_rows=3)
    with batcher.room(2):
        with pytest.raises(FullError) as refused, batcher.room(2):
            pass
        assert refused.value.retry_s >= 1
        with batcher.room(1):
            assert batcher.rows == 3
    with batcher.room(3):
        pass
    assert batcher.rows == 0


def test_what_nobody_waits_for_leaves_the_queue() -> None:
    passes = Passes(held=True)
    batcher = Batcher(passes, batch_tokens=1000, wait_s=0.0, most_rows=100)

    async def leave() -> list[Any]:
        work = asyncio.create_task(batcher.work())
        first = asyncio.create_task(batcher.outputs(rows(3)))
        await passes.running()
        leaving, staying = (asyncio.create_task(batcher.outputs(rows(length))) for length in (4, 5))
        await asyncio.sleep(0)
        leaving.cancel()
        first.cancel()  # of the pass that runs: its outputs are dropped
        await asyncio.gather(leaving, first, return_exceptions=True)
        passes.go.set()
        try:
            return await staying
        finally:
            work.cancel()

    (found,) = asyncio.run(leave())
    assert float(found[0]) == 5
    assert passes.lengths == [[3], [5]]


def test_a_pass_that_fails_is_the_last_of_its_requests_alone(caplog: pytest.LogCaptureFixture) -> None:
    batcher = Batcher(Passes(), batch_tokens=1000, wait_s=0.0, most_rows=100)
    asked = [rows(13), rows(4), rows(5, adapter=LATE)]
    failed, beside, other = asyncio.run(with_work(batcher, *map(batcher.outputs, asked)))
    assert isinstance(failed, PassError)
    assert isinstance(beside, PassError)
    assert float(other[0][0]) == 5
    assert "no memory" in caplog.text
