"""One run's way through a lane: what it learns from, how far it is, what it keeps and what it writes.

The training loop drives one of them, a pack several: either way a run does the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpc_dist.adapter.lane import Adapter
from gpc_dist.adapter.store import save_adapter
from gpc_dist.config import Config, warmup_steps
from gpc_dist.distributed import checkpoint
from gpc_dist.distributed.checkpoint import Checkpoint
from gpc_dist.distributed.optimizer import LaneOptimizer
from gpc_dist.errors import UserError
from gpc_dist.tasks import EpochPlan
from gpc_dist.training.card import task_card
from gpc_dist.training.schedule import factor
from gpc_dist.training.session import Session, Split
from gpc_dist.training.step import Done, Work

_EPOCHS = 10.0

MetricSink = Callable[[int, dict[str, float]], None]
"""Takes a step and its figures."""


@dataclass
class Position:
    """How far a run is: what a checkpoint holds beside tensors."""

    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    """Metrics of the best evaluation so far."""
    best_step: int | None = None
    last: dict[str, float] = field(default_factory=dict)
    """Metrics of the newest evaluation."""
    evaluated_step: int = 0
    """Step of the newest evaluation."""
    stale: int = 0
    """Evaluations since the best one."""
    ended: bool = False
    """Early stopping has ended the run."""
    share_s: float = 0.0
    """In a pack: seconds of the steps and evaluations it was in, each shared equally by the runs that were."""


@dataclass
class Speed:
    """What the steps of this process cost, evaluation and saving left out."""

    step_s: list[float] = field(default_factory=list)
    examples: int = 0
    tokens: int = 0
    """Text tokens without padding."""
    padded_tokens: int = 0
    """Text tokens if every row of a step were as long as its longest: ranks and micro-batches pad less."""
    first_step_at_s: float | None = None
    """Unix time at which the first step was done."""

    def count(self, split: Split, indices: np.ndarray, seconds: float) -> None:
        """Add a step; the first one, which also warms up, is left out."""
        if self.first_step_at_s is None:
            self.first_step_at_s = time.time()
            return
        encoded = split.encoded
        rows = [r for i in indices for r in range(*encoded.example_starts[i : i + 2])]
        lengths = encoded.lengths[rows]
        self.step_s.append(seconds)
        self.examples += len(indices)
        self.tokens += int(lengths.sum())
        self.padded_tokens += int(len(lengths) * lengths.max())

    def figures(self) -> dict[str, float | None]:
        """For `result.json`."""
        total_s = sum(self.step_s)
        return {
            "samples_per_s": self.examples / total_s if total_s else None,
            "tokens_per_s": self.tokens / total_s if total_s else None,
            "padding_pct": 100 * (1 - self.tokens / self.padded_tokens) if self.padded_tokens else None,
            "step_ms": 1000 * statistics.median(self.step_s) if self.step_s else None,
        }


@dataclass(frozen=True)
class Outlet:
    """Where a run keeps things."""

    checkpoints: Path
    best_adapter: Path
    write: MetricSink | None
    """Takes figures, on rank 0; None elsewhere."""


class LaneRun:
    """One run in a lane of a session's encoder; every rank has its own, in step with the others.

    Args:
        config: of this run; what a session fixes (encoder, task, engine) is the session's.
        saved: the state to go on from.

    Raises:
        UserError: the state is of an encoder with other weights.
    """

    def __init__(
        self,
        session: Session,
        config: Config,
        adapter: Adapter,
        training: Split,
        validation: Split,
        outlet: Outlet,
        saved: Checkpoint | None,
    ):
        settings = config.train
        self.session, self.config, self.adapter = session, config, adapter
        self.training, self.validation, self.outlet = training, validation, outlet
        self.plan = EpochPlan(
            training.encoded.sizes, config.run.seed, settings.batch_size, settings.batch_tokens
        )
        self.total = settings.steps or self.plan.total_steps(settings.epochs or _EPOCHS)
        self.optimizer = LaneOptimizer(adapter, settings, session.world, config.engine.zero_stage)
        self.position = self._resume(saved)
        self.speed = Speed()
        self._nonfinite = 0
        self._batches = self.plan.batches(self.position.step)

    @property
    def over(self) -> bool:
        """Whether its steps are done, or early stopping has ended it."""
        return self.position.step >= self.total or self.position.ended

    @property
    def evaluation_due(self) -> bool:
        """Whether the state it has reached is to be evaluated, and was not yet."""
        step, every = self.position.step, self.config.train.eval_every
        periodic = self.plan.locate(step)[1] == 0 if every is None else step % every == 0
        return step > self.position.evaluated_step and (step == self.total or periodic)

    def next_work(self) -> Work:
        """The examples of the next step but those already asked for."""
        _, indices = next(self._batches)
        return Work(self.training.encoded, indices)

    def set_rate(self) -> None:
        """Set the learning rates of the step that is about to be finished."""
        warmup = warmup_steps(self.config.train, self.total)
        self.optimizer.set_factor(factor(self.config.train.schedule, self.position.step, warmup, self.total))

    def count_step(self, work: Work, done: Done, seconds: float) -> dict[str, float] | None:
        """Take note of a finished step; returns its figures if they are to be logged.

        Raises:
            UserError: the loss stays non-finite.
        """
        settings, position = self.config.train, self.position
        epoch = self.plan.locate(position.step)[0]
        position.step += 1
        self.speed.count(self.training, work.indices, seconds)
        self._nonfinite = 0 if done.finite else self._nonfinite + 1
        if self._nonfinite >= settings.nonfinite_patience:
            raise UserError(
                f"the loss was not finite (nan or inf) for {self._nonfinite} steps up to step {position.step}: lower "
                "train.lr, use a longer train.warmup, or set engine.dtype fp32"
            )
        last = position.step == self.total
        if not (position.step % settings.log_every == 0 or last or not done.finite):
            return None
        speed = self.speed.figures()
        figures: dict[str, float] = {
            "train/loss": done.loss,
            "train/grad_norm": done.norm,
            "train/lr_factor": self.optimizer.factor,
            "train/epoch": epoch,
            "train/tokens_per_s": speed["tokens_per_s"] or 0.0,
            "train/samples_per_s": speed["samples_per_s"] or 0.0,
            "train/progress_pct": 100 * position.step / self.total,
        }
        self._write(figures)
        return figures

    def note_evaluation(self, metrics: dict[str, float]) -> None:
        """Keep the adapter if it is the best so far; end the run if none was for too long."""
        task, position, patience = self.session.task, self.position, self.config.train.patience
        position.last, position.evaluated_step = metrics, position.step
        value, best = metrics[task.main_metric], position.best.get(task.main_metric)
        if best is None or (value > best if task.greater_is_better else value < best):
            position.best, position.best_step, position.stale = metrics, position.step, 0
            if self.session.world.is_main:
                card = task_card(self.config, task)
                save_adapter(self.outlet.best_adapter, self.adapter, self.session.base.identity, card)
        else:
            position.stale += 1
            position.ended = patience is not None and position.stale >= patience
        self._write({f"val/{name}": metric for name, metric in metrics.items()})

    def save_due(self, evaluated: bool) -> bool:
        """Whether its state is to be saved after this step."""
        every = self.config.train.save_every
        return self.over or (evaluated if every is None else self.position.step % every == 0)

    def save(self) -> None:
        """Save its state; every rank must call it."""
        session, position = self.session, self.position
        tensors = self.optimizer.state()
        rng = session.world.gather(checkpoint.rng_state())
        if session.world.is_main:
            assert rng is not None
            state = {
                "position": asdict(position),
                "identity": identity(self.config),
                "encoder_sha256": session.base.identity.sha256,
            }
            folder = self.outlet.checkpoints
            checkpoint.save(folder, Checkpoint(position.step, tensors, rng, state))
            checkpoint.prune(folder, self.config.train.keep_last, position.best_step)

    def _write(self, figures: dict[str, float]) -> None:
        if self.outlet.write:
            self.outlet.write(self.position.step, figures)

    def _resume(self, saved: Checkpoint | None) -> Position:
        if saved is None:
            return Position()
        found, world = self.session.base.identity, self.session.world
        if saved.state["encoder_sha256"] != found.sha256:
            raise UserError(
                f"the weights of encoder '{found.path}' have changed since step {saved.step} was saved: restore them, "
                "or give --train.resume false to start again"
            )
        self.optimizer.load(saved.tensors)
        if len(saved.rng) == world.size:
            torch.set_rng_state(saved.rng[world.rank])
        return Position(**saved.state["position"])


def identity(config: Config) -> dict[str, Any]:
    """What two parts of one run must agree on for the second to go on from the first's checkpoint."""
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


def _completed(theirs: dict[str, Any]) -> dict[str, Any]:
    """An identity that was saved before a key of the configuration existed, with that key's default."""
    sections = {key: field.default.model_dump(mode="json") for key, field in Config.model_fields.items()}
    return {key: sections[key] | value if key in sections else value for key, value in theirs.items()}


def saved_state(checkpoints: Path, config: Config) -> Checkpoint | None:
    """The newest complete checkpoint, verified; None when there is none or it is not to be used.

    Raises:
        UserError: it is damaged, or another run's.
    """
    path = checkpoint.newest(checkpoints) if config.train.resume else None
    if path is None:
        return None
    saved = checkpoint.load(path)
    mine, theirs = identity(config), _completed(saved.state["identity"])
    if differing := [key for key in mine if mine[key] != theirs.get(key)]:
        raise UserError(
            f"{path} belongs to a run with another {', '.join(differing)}: give this run its own --run.name, "
            "or --train.resume false to start again here"
        )
    return saved
