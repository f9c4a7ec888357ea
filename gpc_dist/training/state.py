"""Saving and restoring the state of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict

from gpc_dist.adapter.fingerprint import EncoderIdentity
from gpc_dist.adapter.lane import Origin
from gpc_dist.config import Config
from gpc_dist.distributed import checkpoint
from gpc_dist.distributed.checkpoint import Checkpoint
from gpc_dist.distributed.optimizer import LaneOptimizer
from gpc_dist.distributed.world import World
from gpc_dist.distributed.zero_optimizer import Optimizer, ZeroOptimizer
from gpc_dist.errors import UserError
from gpc_dist.typed import check_as


@dataclass
class Position:
    """Progress of a run, as its checkpoints hold it."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    """Metrics of the best evaluation so far."""
    best_step: int | None = None
    best_confusion: list[list[int]] | None = None
    """Of the best evaluation, see `Task.confusion`."""
    last: dict[str, float] = field(default_factory=dict)
    """Metrics of the newest evaluation."""
    evaluated_step: int = 0
    """Step of the newest evaluation."""
    stale: int = 0
    """Evaluations since the best one."""
    ended: bool = False
    """Early stopping has ended the run."""
    origin: Origin | None = None
    """The adapter that the run started from, if it did."""
    share_s: float = 0.0
    """Seconds spent on the run: its part of those of each step, by its tokens in the passes, and of each evaluation."""


def saved_state(checkpoints: Path, config: Config, world: World) -> Checkpoint | None:
    """Load and verify the newest complete checkpoint; None if there is none or `train.resume` is false.

    Rank 0 decides which one it is, because a file system may show other ranks an older state of the folder. Every rank
    must call it.

    Raises:
        UserError: on any rank, the checkpoint is damaged, belongs to another run, or is not what rank 0 has; raised on
            every rank.
    """

    def choose() -> str | None:
        path = checkpoint.newest(checkpoints) if config.train.resume else None
        return None if path is None else path.name

    name = world.on_main(choose)
    if name is None:
        return None
    path = checkpoints / name
    saved = load_on_all(path, world)
    mine, theirs = identity(config), saved.state.get("identity")
    if not isinstance(theirs, dict):
        raise checkpoint.damaged(str(path), "its state names no run")
    if differing := [key for key in mine if mine[key] != _completed(key, theirs.get(key))]:
        raise UserError(
            f"{path} belongs to a run with another {', '.join(differing)}: give this run its own --run.name, "
            "or --train.resume false to start again here"
        )
    return saved


def load_on_all(path: Path, world: World) -> Checkpoint:
    """Load and verify a checkpoint on every rank, all of which must call it.

    Raises:
        UserError: it is damaged, or not on every rank what it is on rank 0; raised on every rank.
    """
    seal = world.on_main(lambda: checkpoint.seal(path))
    return world.on_all(lambda: checkpoint.load(path, seal, world.rank, world.size))


def save_state(
    checkpoints: Path,
    config: Config,
    encoder: EncoderIdentity,
    optimizer: Optimizer,
    position: Position,
) -> None:
    """Write a checkpoint; keep only the newest `train.keep_last` and the best one. Every rank must call it."""
    world = optimizer.world
    tensors = optimizer.state() if isinstance(optimizer, LaneOptimizer) else {}
    states = world.gather_tensors({"rng": checkpoint.rng_state()})
    state = {
        "position": asdict(position),
        "identity": identity(config),
        "encoder_sha256": encoder.sha256,
    }
    found = Checkpoint(position.step, tensors, [each["rng"] for each in states or ()], state)
    if isinstance(optimizer, ZeroOptimizer):
        checkpoint.save_parts(checkpoints, found, optimizer.part(), world)
    elif world.is_main:
        checkpoint.save(checkpoints, found)
    if world.is_main:
        checkpoint.prune(checkpoints, config.train.keep_last, position.best_step)


def restore_state(saved: Checkpoint, encoder: EncoderIdentity, optimizer: Optimizer) -> Position:
    """Restore the tensors of a checkpoint; returns the position. Every rank must call it.

    This rank's random generator is restored if the number of ranks is the same.

    Raises:
        UserError: the encoder's weights have changed since the checkpoint was saved; or it is damaged, or of another
            adapter; raised on every rank.
    """
    return optimizer.world.on_all(lambda: _restore_state(saved, encoder, optimizer))


def _restore_state(saved: Checkpoint, encoder: EncoderIdentity, optimizer: Optimizer) -> Position:
    if saved.state.get("encoder_sha256") != encoder.sha256:
        raise UserError(
            f"the weights of encoder '{encoder.path}' have changed since step {saved.step} was saved: restore them, "
            "or give --train.resume false to start again"
        )
    if bool(saved.part_files) is isinstance(optimizer, LaneOptimizer):
        raise UserError(
            f"checkpoint {saved.name} was saved {'by' if saved.part_files else 'without'} DeepSpeed's optimizer, which "
            "fine-tunes at engine.zero_stage 3, and at 1 and 2 on several ranks, and not otherwise: go on at such a "
            "stage as it was saved at, or give --train.resume false to start again"
        )
    world: World = optimizer.world
    try:
        position = check_as(Position, saved.state.get("position"), "its position")
        if position.step != saved.step:
            raise UserError(f"its position is step {position.step}")
        if isinstance(optimizer, LaneOptimizer):
            optimizer.load(saved.tensors)
        else:
            optimizer.load(saved.parts())
        if len(saved.rng) == world.size:
            torch.set_rng_state(saved.rng[world.rank])
    except (UserError, RuntimeError, TypeError) as error:
        raise checkpoint.damaged(saved.name, str(error)) from None
    return position


def _completed(key: str, held: Any) -> Any:
    """A value of an `identity`, which may be of an older version: keys that it lacks had no effect, as by default."""
    usual = identity(Config())[key]
    return usual | held if isinstance(usual, dict) and isinstance(held, dict) else held


def identity(config: Config) -> dict[str, Any]:
    """Return the settings that must be equal in a checkpoint and in the run that resumes from it."""
    values = config.dump()
    train = ("batch_size", "batch_tokens", "optimizer")
    return {
        "encoder": values["encoder"],
        "adapter": values["adapter"],
        "task": values["task"],
        "data": values["data"],
        "seed": values["run"]["seed"],
        **{f"train.{key}": values["train"][key] for key in train},
    }
