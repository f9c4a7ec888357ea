"""The text states that enter the first layer that depends on an adapter: read from a cache, or computed for each pass.

All ranks fill a cache together. Which rows share a pass depends on the data alone, so that the states are the same for
any number of ranks. Ranks that see the same folder fill one cache; otherwise each machine has its own.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gpc_dist import own_folders
from gpc_dist.adapter.fingerprint import EncoderIdentity
from gpc_dist.adapter.halves import LowerHalf, PooledStates
from gpc_dist.config import AdapterConfig, EngineConfig
from gpc_dist.distributed.memory import available_bytes, trim_heap
from gpc_dist.distributed.world import World, encoder_dtype
from gpc_dist.encoder import frozen
from gpc_dist.encoder.attention import choose_kernels
from gpc_dist.encoder.state_cache import (
    CachedStates,
    Layout,
    StatesKey,
    StatesWriter,
    default_root,
    filling,
    is_complete,
    new_cache,
)
from gpc_dist.errors import UserError
from gpc_dist.tasks import Batch, Encoded, LaneBatch, collate, evaluation_batches, one_text
from gpc_dist.training.progress import Progress

log = logging.getLogger(__name__)

_PASS_TOKENS = 4096
"""Padded tokens of a pass that fills a cache. Not configurable, because the states depend on it by rounding."""
_MOST = 0.9
"""Share of what is free on a disk, or available in memory, that a cache may take."""
_WORTH = 0.5
"""Part of the data that a run must read, for all states to be computed and kept: a second run makes up for it."""
_MEMORY = Path("/dev/shm")
"""A file system in memory, in which each user makes folders of his own."""


class TextStates:
    """States that enter layer k > 0 of an encoder. Every rank makes the same calls in the same order.

    The layers below k belong to another copy of the encoder than those of the session. It is loaded when states must
    be computed.

    Args:
        load: loads the encoder, see `Base.load`.
        adapter: its method, where its prompt enters, and what its head reads if it has no prompt.
    """

    def __init__(
        self,
        world: World,
        engine: EngineConfig,
        ds_config: dict[str, Any],
        identity: EncoderIdentity,
        load: Callable[[], frozen.Encoder],
        adapter: AdapterConfig,
        pad_id: int,
    ):
        self._world, self._engine, self._ds_config = world, engine, ds_config
        self._identity, self._load, self._pad_id = identity, load, pad_id
        self._adapter = adapter
        self._first_layer = adapter.entry_layer(identity.layers)
        self._read_from = adapter.read_from(identity.layers)
        self.pooled = 0 if adapter.has_prompt else identity.layers - self._read_from + 1
        """Pooled states of a row, if they are what is cached; 0 if it has states of all its tokens."""
        self.spent_s = 0.0
        """Seconds that this process has spent on filling caches."""
        self._lower: LowerHalf | PooledStates | None = None
        self._in_every_pass = False

    def computed(self, batch: Batch | LaneBatch) -> Tensor:
        """The states of a batch on its device, `[R, T, H]`, or pooled `[R, n, H]`."""
        return self._encoder()(batch.input_ids, batch.attention_mask, batch.token_type_ids)

    def entering(self, ids: Tensor) -> Tensor:
        """The states of a text of these tokens `[n]`: float32 `[n, H]` on the CPU, the same on every rank."""
        text = one_text(ids.cpu().numpy())
        if (cached := self.cached(text)) is not None:
            return cached.padded(np.array([0]), len(ids))[0].float()
        found = self._pass(text, np.array([0]))[0].float().to(self._world.device)
        self._world.copy_from(found, 0)
        return found.cpu()

    @property
    def modules(self) -> nn.Module | None:
        """The encoder that computes states on this rank, if it is loaded."""
        parts = self._lower.parts if self._lower else None
        return nn.ModuleList([parts.encoder, parts.token_embeddings]) if parts else None

    def release(self) -> None:
        """Release the layers below k, unless every pass runs them."""
        if self._lower is not None and not self._in_every_pass:
            self._lower = None
            gc.collect()  # modules of transformers refer to each other
            trim_heap()
            if self._world.device.type == "cuda":
                torch.cuda.empty_cache()

    def cached(self, encoded: Encoded, part: float = 1.0) -> CachedStates | None:
        """The states of all rows of a data set, which are computed if no cache has them. None if each pass is to
        compute its own: there is no room, or with `engine.state_cache` auto so few are read that it is not worth it.

        Args:
            part: how many of the examples the run reads, as a part of all; above 1 if it reads them again.

        Raises:
            UserError: there is no room where `engine.state_cache` wants them, or a cache is damaged.
        """
        wanted = self._engine.state_cache
        rows = encoded.with_rows_of(self.pooled) if self.pooled else encoded
        key = self._key(encoded)
        layout = Layout(rows.lengths, key.hidden_size, key.dtype)
        if wanted == "auto" and part < _WORTH:
            found = self._complete(default_root(), key, layout)
            if found is None and self._world.is_main:
                log.info("each pass computes its text states: this run reads %.2g %% of the data", 100 * part)
            self._in_every_pass |= found is None
            return found
        for where in ("disk", "memory"):
            if wanted in (where, "auto"):
                found = self._find(where, key, layout, encoded)
                if found is not None:
                    return found
                self._say_no_room(where, layout.bytes)
        self._in_every_pass = True
        return None

    def _complete(self, root: Path, key: StatesKey, layout: Layout) -> CachedStates | None:
        """A cache that is complete for every rank."""
        missing = self._world.any(not is_complete(root / key.folder))
        return None if missing else CachedStates(root / key.folder, key, layout)

    def _find(self, where: str, key: StatesKey, layout: Layout, encoded: Encoded) -> CachedStates | None:
        """A complete cache on disk or in memory, the same on every rank; None if any rank has no room for it."""
        world = self._world
        root = default_root() if where == "disk" else self._in_memory()
        missing = not is_complete(root / key.folder)
        if world.any(missing):
            if world.any(missing and not _can_hold(root, layout.bytes)):
                return None
            self._fill(root, key, layout, encoded)
        found = CachedStates(root / key.folder, key, layout)
        if where == "memory":
            world.any(False)  # every rank has it open, so that its memory goes with the last of them
            shutil.rmtree(root, ignore_errors=True)
        return found

    def _in_memory(self) -> Path:
        """A new folder in memory that the ranks of a machine share."""
        hosts = self._world.from_all(socket.gethostname())
        first = hosts.index(socket.gethostname())
        own = first == self._world.rank and os.access(_MEMORY, os.W_OK)
        folders = self._world.from_all(str(own_folders.temporary(_MEMORY)) if own else "")
        return Path(folders[first] or _MEMORY / "not-writable" / "states")

    def _fill(self, root: Path, key: StatesKey, layout: Layout, encoded: Encoded) -> None:
        world, start = self._world, time.monotonic()
        ranks = self._sharers(root)
        passes = evaluation_batches(encoded.sizes, 0, 1, _PASS_TOKENS)
        with ExitStack() as stack:
            folder = ""
            if ranks[0] == world.rank:
                stack.enter_context(filling(root, key))
                if not is_complete(root / key.folder):  # another job may have filled it meanwhile
                    folder = str(stack.enter_context(new_cache(root, key, layout)))
            folder = world.from_all(folder)[ranks[0]]
            own = passes[ranks.index(world.rank) :: len(ranks)] if folder else []
            # under ZeRO-3 a pass is a collective: every rank runs as many as the one that has most
            count = max(world.from_all(len(own))) if self._engine.zero_stage == 3 else len(own)
            if world.is_main and count:
                log.info("computing the text states that enter %s: %s", self._entered, _size(layout.bytes))
            writer = stack.enter_context(StatesWriter(Path(folder), layout)) if folder else None
            with Progress("pass", count, 0, world.is_main) as progress:
                for number in range(count):
                    indices = own[number] if number < len(own) else passes[0][:1]
                    states = self._pass(encoded, indices)
                    if writer is not None and number < len(own):
                        writer.write(encoded.rows_of(indices), states)
                    progress.step()
            world.any(False)  # all have written
        world.any(False)  # the first of them has put the folder into its place
        self.spent_s += time.monotonic() - start

    def _sharers(self, root: Path) -> list[int]:
        """The ranks that see the same folder as this one, itself included."""
        world = self._world
        mark = root / f".{world.from_main(uuid.uuid4().hex)}"
        world.on_main(mark.touch)
        marks = world.from_all("" if mark.exists() else socket.gethostname())
        world.on_main(lambda: mark.unlink(missing_ok=True))
        return [rank for rank, each in enumerate(marks) if each == marks[world.rank]]

    def _pass(self, encoded: Encoded, indices: np.ndarray) -> Tensor:
        """The states of all rows of some examples, on the CPU: `[R, T, H]`, or pooled `[R, n, H]`."""
        return self.computed(collate(encoded, indices, self._pad_id).to(self._world.device)).cpu()

    def _encoder(self) -> LowerHalf | PooledStates:
        """What computes states, loaded when it is needed."""
        if self._lower is None:
            encoder = self._load()
            choose_kernels(encoder.parts.layers)
            if self.pooled:
                self._lower = PooledStates(encoder.parts, self._pooling, self._read_from)
            else:
                self._lower = LowerHalf(encoder.parts, self._first_layer)
            frozen.place(encoder, self._world, self._engine, self._ds_config, self._lower.parts)
        return self._lower

    def _key(self, encoded: Encoded) -> StatesKey:
        dtype = torch.float32 if self.pooled else encoder_dtype(self._engine, self._world.device)
        # shards have scales of other values
        int8_shards = self._engine.quantize == "int8" and self._engine.zero_stage == 3
        return StatesKey(
            encoder=self._identity.path,
            encoder_sha256=self._identity.sha256,
            first_layer=self._read_from if self.pooled else self._first_layer,
            pooling=self._pooling if self.pooled else "",
            dtype=str(dtype).removeprefix("torch."),
            quantize="int8 shards" if int8_shards else self._engine.quantize,
            hidden_size=self._identity.hidden_size,
            data_sha256=encoded.digest(),
        )

    @property
    def _entered(self) -> str:
        return "the head" if self.pooled else f"layer {self._first_layer}"

    @property
    def _pooling(self) -> Literal["mean", "first"]:
        return "first" if self._adapter.pooling == "first" else "mean"

    def _say_no_room(self, where: str, size: int) -> None:
        wanted = self._engine.state_cache
        said = f"no room {'on' if where == 'disk' else 'in'} {where} for the {_size(size)} of text states that enter "
        said += self._entered
        if wanted != "auto":
            raise UserError(
                f"{said}: free some, move the cache (GPC_DIST_CACHE), or give engine.state_cache none, which computes "
                "them in every pass"
            )
        if self._world.is_main:
            log.warning("%s%s", said, "" if where == "disk" else ": every pass computes its own")


def _can_hold(root: Path, size: int) -> bool:
    """Whether a cache of `size` bytes can be made in a folder, which is made where it is missing."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
    except OSError as error:
        log.debug("%s cannot hold a cache: %s", root, error)
        return False
    return size <= _MOST * (min(free, available_bytes()) if _MEMORY in root.parents else free)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"
