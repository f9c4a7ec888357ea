"""Adapters at work: from a request's rows to its predictions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

from gpc_dist.errors import UserError
from gpc_dist.inference.server.batcher import Batcher
from gpc_dist.inference.server.catalog import Catalog
from gpc_dist.inference.server.encoder import Loaded
from gpc_dist.inference.server.metrics import Metrics
from gpc_dist.inference.server.options import Options
from gpc_dist.inference.server.places import Place
from gpc_dist.tasks import Prediction

log = logging.getLogger(__name__)

_BATCH_TOKENS = {"cpu": 256, "cuda": 16384}
"""By device: larger passes are hardly faster per token, and everybody in them waits longer. (MiniLM on one core: 31 ms
for a row by itself, 20 ms for each of 4, of 16 and of 32 rows of some 50 tokens.)"""


class Service:
    """Loads the encoder and the adapters; `running` lets them answer.

    Raises:
        UserError: see `Catalog`.
    """

    def __init__(self, options: Options):
        self.options = options
        self.catalog = Catalog(list(map(Place.parse, options.places)), options.settings)
        self.metrics = Metrics(lambda: self.batcher.rows, lambda: len(self.catalog.held))
        encoder = self.catalog.encoder
        self.batcher = Batcher(
            encoder.run,
            options.batch_tokens or _BATCH_TOKENS[encoder.device.type],
            options.wait_ms / 1000,
            options.queue_rows,
            self.metrics.one_pass,
        )
        # tokenizers are not made for several threads, and one keeps passes busy
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._tasks: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer while the block runs."""
        self._tasks = [asyncio.create_task(self.batcher.work())]
        if self.options.reload_s is not None:
            self._tasks.append(asyncio.create_task(self._reload(self.options.reload_s)))
        try:
            yield
        finally:
            for task in self._tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            self._reader.shutdown()

    @property
    def ready(self) -> bool:
        """Whether requests will be answered."""
        return bool(self._tasks) and not any(task.done() for task in self._tasks)

    async def predict(self, loaded: Loaded, rows: Sequence[Mapping[str, Any]]) -> list[Prediction]:
        """The prediction for each example in the rows.

        Raises:
            UserError: a row is none of the task's, or its texts are more than may be in work at all.
            FullError: there is no room for the rows now.
            PassError: see `Batcher.outputs`.
        """
        most = self.options.queue_rows
        if len(rows) > most:  # there never will be room
            raise UserError(f"these are {len(rows)} rows, and at most {most} may wait: ask in parts")
        with self.batcher.room(len(rows)):
            read = partial(self.catalog.encoder.read, loaded, rows, most)
            question = await asyncio.get_running_loop().run_in_executor(self._reader, read)
            # candidates are rows of the encoder's
            with self.batcher.room(max(0, len(question.rows) - len(rows))):
                return question.predictions(await self.batcher.outputs(question.rows))

    async def _reload(self, period_s: float) -> None:
        while True:
            await asyncio.sleep(period_s)
            try:
                self.metrics.taken_up(await asyncio.to_thread(self.catalog.look_again))
            except Exception:  # whatever is wrong there, what is loaded goes on
                log.exception("the places could not be looked at again")
