"""The process group: this rank, its device, and the collectives that the program uses."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from gpc_dist.config import EngineConfig
from gpc_dist.distributed import rendezvous
from gpc_dist.distributed.launch import LOST
from gpc_dist.distributed.memory import out_of_memory
from gpc_dist.distributed.messages import Messages
from gpc_dist.errors import MachineError, UserError
from gpc_dist.parsing import parse_json
from gpc_dist.private.torch import set_group_timeout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""By their names in `engine.dtype`."""

T = TypeVar("T")


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
        """A value of every rank, as JSON has it, on rank 0; None elsewhere."""
        if self.size == 1:
            return [value]
        found = self._messages.gather(json.dumps(value).encode())
        if found is None:
            return None
        return [parse_json(each, f"the message of rank {rank}") for rank, each in enumerate(found)]

    def gather_tensors(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]] | None:
        """Named tensors of every rank, which may have other names and shapes on each, on the CPU of rank 0; None
        elsewhere."""
        if self.size == 1:
            return [tensors]
        found = self._messages.gather(save(tensors))
        return None if found is None else [load(each) for each in found]

    def from_all(self, value: Any) -> list[Any]:
        """The values of all ranks, as JSON has them, on every rank."""
        found: list[Any] = self.from_main(self.gather(value))
        return found

    def from_main(self, value: Any) -> Any:
        """The value of rank 0, as JSON has it, on every rank."""
        if self.size == 1:
            return value
        found = self._messages.broadcast(json.dumps(value).encode() if self.is_main else b"")
        return parse_json(found, "the message of rank 0")

    @cached_property
    def _messages(self) -> Messages:
        return Messages(self.rank, self.size, self.device, rendezvous.secret())

    def on_main(self, call: Callable[[], Any]) -> Any:
        """Call something on rank 0; every rank must call this.

        Returns:
            What the call returned, as JSON has it, on every rank.

        Raises:
            UserError: what the call raised, on every rank; a `MachineError` for an OSError.
        """
        found, problem = _tried(call) if self.is_main else (None, None)
        found, problem = self.from_main([found, problem])
        if problem:
            raise _refusal(problem)
        return found

    def on_all(self, call: Callable[[], T]) -> T:
        """Call something on every rank; every rank must call this.

        Returns:
            What the call returned on this rank.

        Raises:
            UserError: what the call raised on the lowest rank on which it did, on every rank; a `MachineError` for
                an OSError.
        """
        found, problem = _tried(call)
        problems = self.from_all([problem, socket.gethostname()])
        for rank, (each, host) in enumerate(problems):
            if each:
                raise _refusal(each, f"rank {rank} on {host}: " if rank else "")
        return found  # type: ignore[return-value]

    def leave(self) -> None:
        """Close the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


_Problem = tuple[str, bool]
"""What a call was refused with, and whether the machine is at fault."""


def _tried(call: Callable[[], T]) -> tuple[T | None, _Problem | None]:
    """What a call returned, or why it was refused."""
    try:
        return call(), None
    except UserError as error:
        return None, (str(error), isinstance(error, MachineError))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return None, (f"{where}{error.strerror or error}", True)


def _refusal(problem: _Problem, prefix: str = "") -> UserError:
    said, machine = problem
    return (MachineError if machine else UserError)(prefix + said)


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
    timeout = timedelta(seconds=config.timeout_s)
    set_group_timeout(timeout)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=rendezvous.meet(rank, size, config.timeout_s) if size > 1 else dist.HashStore(),
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
        world = World(rank, size, local_rank, device)
        # before anything else is taken from another rank, all have shown that they know the job's secret
        world.gather(None)
        world.from_main(None)
        return world
    except (OSError, RuntimeError, ValueError) as error:
        raise MachineError(
            f"rank {rank} of {size} could not join at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')}: {str(error).strip().splitlines()[0]}"
        ) from None


@contextmanager
def joined(config: EngineConfig) -> Iterator[World]:
    """The job's ranks, see `init_world`; at the end of the block this one leaves them.

    Raises:
        UserError, MachineError: as `init_world` and `explained`.
    """
    world = init_world(config)
    try:
        with explained(config):
            yield world
    finally:
        world.leave()


@contextmanager
def explained(config: EngineConfig) -> Iterator[None]:
    """Say in one line what a library says at length in the block: another rank was lost, or there is no memory.

    Raises:
        MachineError: says so.
    """
    try:
        yield
    except Exception as error:
        if told := lost_rank(error, config) or out_of_memory(error, config):
            raise told from None
        raise


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
        f"{LOST}, or did not answer for {config.timeout_s} s (engine.timeout_s): see what it said "
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
    return DTYPES[config.dtype]
