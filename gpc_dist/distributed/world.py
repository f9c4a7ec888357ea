"""The process group: this rank, its device, and the collectives that the program uses."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpc_dist.config import EngineConfig
from gpc_dist.errors import MachineError, UserError

_PATIENCE_S = 10.0
"""Seconds after which a rank says for whom it waits, for the first time."""


@dataclass(frozen=True)
class World:
    """The ranks of a job, seen from one of them."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any rank's flag is set; every rank must call it."""
        return self.sum(torch.tensor(float(flag), device=self.device)).item() > 0

    def sum_to(self, tensor: Tensor, rank: int) -> None:
        """`tensor` summed over all ranks, in place on `rank` only; undefined elsewhere."""
        if self.size > 1:
            dist.reduce(tensor, dst=rank)

    def copy_from(self, tensor: Tensor, rank: int) -> None:
        """`tensor` of `rank` on every rank, in place."""
        if self.size > 1:
            dist.broadcast(tensor, src=rank)

    def gather(self, value: Any) -> list[Any] | None:
        """A small Python object of every rank, on rank 0; None elsewhere."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_main else None
        dist.gather_object(value, values)
        return values

    def from_main(self, value: Any) -> Any:
        """A small Python object of rank 0 on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def on_main(self, call: Callable[[], None]) -> None:
        """Call something on rank 0; every rank must call this.

        Raises:
            UserError: what the call raised, on every rank.
        """
        problem = ""
        if self.is_main:
            try:
                call()
            except UserError as error:
                problem = str(error)
        if problem := self.from_main(problem):
            raise UserError(problem)

    def leave(self) -> None:
        """Close the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def init_world(config: EngineConfig) -> World:
    """Join the job's process group (nccl on GPUs, gloo on CPUs); alone when no ranks were given.

    Raises:
        UserError: `engine.device` is cuda and there is no GPU for this rank.
        MachineError: the other ranks cannot be reached.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(config, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1 and config.zero_stage < 3 and config.plan == "none":
        return World(rank, size, local_rank, device)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_meet(rank, size, config.timeout_s) if size > 1 else dist.HashStore(),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=config.timeout_s),
        )
    except (RuntimeError, ValueError) as error:
        raise MachineError(
            f"rank {rank} of {size} could not join at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')}: {error}"
        ) from None
    return World(rank, size, local_rank, device)


def _meet(rank: int, size: int, timeout_s: int) -> dist.Store:
    """The ranks' common store at MASTER_ADDR and MASTER_PORT, when all of them are there.

    Who waits says for whom, on standard error whichever rank it is: rank 0 for the others, and they for rank 0.

    Raises:
        UserError: the environment does not say where.
        RuntimeError: a rank did not come in time.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if host is None or port is None:
        raise UserError(
            f"rank {rank} of {size} (RANK and WORLD_SIZE in the environment) needs MASTER_ADDR and MASTER_PORT there: "
            "start several ranks with torchrun or with the batch scripts in slurm/, or unset RANK and WORLD_SIZE"
        )

    def say(missing: Sequence[int]) -> None:
        print(
            f"gpc-dist: rank {rank} of {size} waits at {host}:{port} for {_named(missing)}, at most {timeout_s} s "
            "(engine.timeout_s); to run alone, unset RANK and WORLD_SIZE",
            file=sys.stderr,
            flush=True,
        )

    # torchrun has a store of its own there
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    waiting = threading.Timer(_PATIENCE_S, say, [[0]])
    waiting.daemon = True
    waiting.start()
    try:
        store = dist.TCPStore(
            host,
            int(port),
            is_master=serves,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    finally:
        waiting.cancel()
    keys, met = [f"gpc-dist/rank-{other}" for other in range(size)], "gpc-dist/met"
    store.set(keys[rank], "")
    if rank > 0:
        store.wait([met])
        return store
    started, next_s = time.monotonic(), _PATIENCE_S
    while not store.check(keys):
        if (waited_s := time.monotonic() - started) > min(next_s, timeout_s):
            missing = [other for other, key in enumerate(keys) if not store.check([key])]
            if waited_s > timeout_s:
                raise RuntimeError(f"{_named(missing)} did not come within {timeout_s} s")
            say(missing)
            next_s *= 2
        time.sleep(0.02)
    store.set(met, "")
    return store


def _named(ranks: Sequence[int]) -> str:
    return "rank " + ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


def alone(config: EngineConfig) -> World:
    """This process without other ranks; on a GPU where there is one, unless `engine.device` is cpu."""
    cuda = config.device != "cpu" and torch.cuda.is_available()
    return World(0, 1, 0, torch.device("cuda" if cuda else "cpu"))


_LOST = re.compile(
    r"connection (closed|reset|refused)|timed out|watchdog|socket|unhandled system error", re.I
)


def lost_rank(error: BaseException, config: EngineConfig) -> MachineError | None:
    """The error to raise if a collective failed because another rank is gone or stuck; None for any other error.

    gloo raises a bare RuntimeError, nccl a `DistBackendError`.
    """
    from_peer = isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and _LOST.search(str(error)) is not None
    )
    if not from_peer:
        return None
    return MachineError(
        f"another rank is gone, or did not answer for {config.timeout_s} s (engine.timeout_s): see what it said "
        f"last, and whether its node is up ({str(error).strip().splitlines()[0]})"
    )


def _device(config: EngineConfig, local_rank: int) -> torch.device:
    count = torch.cuda.device_count() if config.device != "cpu" else 0
    if config.device == "cpu" or (config.device == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise UserError("engine.device is cuda, but torch sees no GPU here: use cpu or auto")
    # a batch system may make only its own GPU visible to a rank
    return torch.device("cuda", local_rank if count > 1 else 0)


def encoder_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """The frozen encoder's dtype: `engine.dtype`, or with `auto` bf16 on GPUs that support it, else float32."""
    if config.dtype == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[config.dtype]
