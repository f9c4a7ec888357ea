"""Decides which rows of which requests run next, in one batch.

All of it happens on the event loop; only the passes run in a thread of their own, one after the other.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from gpc_dist.inference.server.encoder import Row
from gpc_dist.tasks import Sizes, evaluation_batches

log = logging.getLogger(__name__)

_LONGEST_RETRY_S = 60


class FullError(Exception):
    """There is no room for a request now."""

    def __init__(self, retry_s: int):
        super().__init__()
        self.retry_s = retry_s
        """Seconds after which there should be."""


class PassError(Exception):
    """A pass failed; the log says why."""


@dataclass(eq=False)
class _Asked:
    """The rows of a request, and the outputs that they have got so far."""

    rows: Sequence[Row]
    answer: asyncio.Future[list[np.ndarray]]
    arrived_s: float
    outputs: dict[int, np.ndarray] = field(default_factory=dict)

    def give(self, number: int, output: np.ndarray) -> None:
        self.outputs[number] = output
        if len(self.outputs) == len(self.rows) and not self.answer.done():
            self.answer.set_result([self.outputs[each] for each in range(len(self.rows))])


@dataclass(frozen=True, eq=False)
class _Waiting:
    asked: _Asked
    number: int

    @property
    def row(self) -> Row:
        return self.asked.rows[self.number]


class Batcher:
    """A bounded queue of rows, and the passes that answer them.

    Args:
        run: one pass: the outputs of rows of one kind.
        batch_tokens: most tokens of a pass, prompts and padding included; one row may have more.
        wait_s: how long a row may wait for others to share its pass, while nothing else runs.
        most_rows: how many rows may be in work; a request for more is refused.
        observe: is told of each pass: its rows and its seconds.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Row]], list[np.ndarray]],
        batch_tokens: int,
        wait_s: float,
        most_rows: int,
        observe: Callable[[Sequence[Row], float], None] = lambda rows, seconds: None,
    ):
        self._run, self._observe = run, observe
        self._batch_tokens, self._wait_s, self._most_rows = batch_tokens, wait_s, most_rows
        self._waiting: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pass")
        self._rows_per_s = float(most_rows)
        self.rows = 0
        """Rows in work: those that wait, run, or are still to be read."""

    @contextmanager
    def room(self, rows: int) -> Iterator[None]:
        """Take room for rows while the block runs.

        Raises:
            FullError: there is not so much.
        """
        if self.rows + rows > self._most_rows:
            raise FullError(min(_LONGEST_RETRY_S, math.ceil(self.rows / self._rows_per_s)))
        self.rows += rows
        try:
            yield
        finally:
            self.rows -= rows

    async def outputs(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """The outputs for each row, float32 `[outputs]`. Once the caller is cancelled, the rows that still wait leave
        the queue.

        Raises:
            PassError: a pass that had one of the rows failed.
        """
        asked = _Asked(rows, asyncio.get_running_loop().create_future(), time.monotonic())
        self._waiting += [_Waiting(asked, number) for number in range(len(rows))]
        self._arrived.set()
        try:
            return await asked.answer
        finally:
            self._waiting = [each for each in self._waiting if each.asked is not asked]

    async def work(self) -> None:
        """Run passes until cancelled; the one that runs is awaited."""
        with self._thread:
            while True:
                await self._arrived.wait()
                await self._wait_for_others()
                if chosen := self._next():
                    await self._answer(chosen)
                if not self._waiting:
                    self._arrived.clear()

    async def _wait_for_others(self) -> None:
        if self._waiting:
            waited_s = time.monotonic() - self._waiting[0].asked.arrived_s
            await asyncio.sleep(max(0.0, self._wait_s - waited_s))

    def _next(self) -> list[_Waiting]:
        """What the next pass runs: of the rows that can share one with the oldest, the ones of its length."""
        if not self._waiting:
            return []
        oldest = self._waiting[0]
        alike = [each for each in self._waiting if each.row.kind == oldest.row.kind]
        sizes = Sizes(np.ones(len(alike), np.int64), np.array([len(each.row) for each in alike]))
        prompt_tokens, _ = oldest.row.kind
        cuts = evaluation_batches(sizes, 0, 1, self._batch_tokens, prompt_tokens)
        numbers = next(cut for cut in cuts if 0 in cut)  # the oldest is the first of its kind
        chosen = [alike[number] for number in numbers]
        taken = set(map(id, chosen))
        self._waiting = [each for each in self._waiting if id(each) not in taken]
        return chosen

    async def _answer(self, chosen: Sequence[_Waiting]) -> None:
        rows = [each.row for each in chosen]
        start_s = time.monotonic()
        try:
            outputs = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, rows)
        except Exception:  # of one batch: the next one may go well
            log.exception("a pass of %d rows failed", len(rows))
            for each in chosen:
                if not each.asked.answer.done():
                    each.asked.answer.set_exception(PassError())
            return
        seconds = time.monotonic() - start_s
        self._rows_per_s += 0.2 * (len(rows) / seconds - self._rows_per_s)
        self._observe(rows, seconds)
        for each, output in zip(chosen, outputs, strict=True):
            each.asked.give(each.number, output)
