"""The training loop: reads top to bottom."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from gpc_dist.adapter.store import save_adapter
from gpc_dist.config import Config, warmup_steps
from gpc_dist.engine import checkpoint
from gpc_dist.engine.checkpoint import Checkpoint
from gpc_dist.engine.optimizer import LaneOptimizer
from gpc_dist.errors import UserError
from gpc_dist.tasks import EpochPlan
from gpc_dist.training.card import task_card
from gpc_dist.training.evaluate import all_outputs
from gpc_dist.training.progress import Progress
from gpc_dist.training.schedule import factor
from gpc_dist.training.session import Session, Split
from gpc_dist.training.step import Done, backward, finish, prepare
from gpc_dist.training.stop import StopRequest

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

    def figures(self) -> dict[str, float | None]:
        """For `result.json`; the first step, which also warms up, does not count when there are others."""
        total_s = sum(self.step_s)
        return {
            "samples_per_s": self.examples / total_s if total_s else None,
            "tokens_per_s": self.tokens / total_s if total_s else None,
            "padding_pct": 100 * (1 - self.tokens / self.padded_tokens) if self.padded_tokens else None,
            "step_ms": 1000 * statistics.median(self.step_s) if self.step_s else None,
        }


@dataclass(frozen=True)
class Outcome:
    """How the loop ended."""

    position: Position
    speed: Speed
    stopped_by: str | None
    """The signal that asked for the stop; None when the run is complete."""


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


def saved_state(checkpoints: Path, config: Config) -> Checkpoint | None:
    """The newest complete checkpoint, verified; None when there is none or it is not to be used.

    Raises:
        UserError: it is damaged, or another run's.
    """
    path = checkpoint.newest(checkpoints) if config.train.resume else None
    if path is None:
        return None
    saved = checkpoint.load(path)
    mine, theirs = identity(config), saved.state["identity"]
    if differing := [key for key in mine if mine[key] != theirs.get(key)]:
        raise UserError(
            f"{path} belongs to a run with another {', '.join(differing)}: give this run its own --run.name, "
            "or --train.resume false to start again here"
        )
    return saved


def train(
    session: Session,
    training: Split,
    validation: Split,
    checkpoints: Path,
    best_adapter: Path,
    saved: Checkpoint | None,
    write: MetricSink | None,
) -> Outcome:
    """Train the session's adapter until its steps are done, early stopping ends it, or a signal stops it.

    The best adapter so far stands in `best_adapter`, training states in `checkpoints`.

    Args:
        saved: the state to go on from.
        write: where figures go, on rank 0; None elsewhere.

    Raises:
        UserError: the loss stays non-finite.
    """
    config, world, model = session.config, session.world, session.model
    settings = config.train
    plan = EpochPlan(training.encoded.sizes, config.run.seed, settings.batch_size, settings.batch_tokens)
    total = settings.steps or plan.total_steps(settings.epochs or _EPOCHS)
    warmup = warmup_steps(settings, total)
    lane = LaneOptimizer(model.adapter, settings, world, config.engine.zero_stage)
    position = _resume(session, lane, saved)
    speed, nonfinite = Speed(), 0

    upcoming = (
        (epoch, prepare(session, training.encoded, indices)) for epoch, indices in plan.batches(position.step)
    )
    epoch, step = next(upcoming)

    model.train()

    def is_evaluation_due() -> bool:
        due = position.step == total or _due(settings.eval_every, position.step, plan)
        return due and position.evaluated_step < position.step

    def run_evaluation() -> bool:
        """Whether it was not cut short by a stop."""
        metrics = evaluate(session, validation, stop)
        if metrics is None:
            return False
        _note_evaluation(session, position, metrics, best_adapter)
        if write:
            write(position.step, {f"val/{name}": value for name, value in metrics.items()})
            main = session.task.main_metric
            progress.show(position.step, {f"val/{main}": metrics[main]})
        return True

    def stopped() -> Outcome:
        return Outcome(position, speed, world.from_main(stop.signal) or "a signal on another rank")

    with StopRequest() as stop, Progress(total, position.step, world.is_main) as progress:
        if position.step and is_evaluation_due():  # the stop of an earlier start came before it
            if not run_evaluation():
                return stopped()
            _save(session, lane, checkpoints, position)
        while position.step < total and not position.ended:
            started_s = time.monotonic()
            lane.set_factor(factor(settings.schedule, position.step, warmup, total))
            loss = backward(session, step)
            following = next(upcoming)  # while the GPU works on this one
            done = finish(session, lane, loss, flag=stop.signal is not None)
            position.step += 1
            _count(speed, training, step.indices, time.monotonic() - started_s)

            nonfinite = 0 if done.finite else nonfinite + 1
            if nonfinite >= settings.nonfinite_patience:
                raise UserError(
                    f"the loss was not finite (nan or inf) for {nonfinite} steps up to step {position.step}: lower "
                    "train.lr, use a longer train.warmup, or set engine.dtype fp32"
                )
            last_of_run = position.step == total
            if write and (position.step % settings.log_every == 0 or last_of_run or not done.finite):
                figures = _train_figures(done, lane, speed, epoch)
                figures["train/progress_pct"] = 100 * position.step / total
                write(position.step, figures)
                progress.show(
                    position.step,
                    {"loss": done.loss, "tokens/s": figures["train/tokens_per_s"]},
                )
            progress.step()

            stopping, evaluated = done.flags > 0, False
            if is_evaluation_due() and not stopping:
                evaluated = run_evaluation()
                stopping = not evaluated
            save = evaluated if settings.save_every is None else position.step % settings.save_every == 0
            if save or last_of_run or stopping or position.ended:
                _save(session, lane, checkpoints, position)
            if stopping:
                return stopped()
            epoch, step = following
    return Outcome(position, speed, None)


def evaluate(session: Session, split: Split, stop: StopRequest) -> dict[str, float] | None:
    """Every metric of the task on a split, on every rank; None if a stop was asked for before its end."""
    model, task, world = session.model, session.task, session.world

    def check_stop() -> None:
        if world.sum(torch.tensor(float(stop.signal is not None), device=world.device)) > 0:
            raise _StopError

    model.eval()
    try:
        outputs = all_outputs(
            model, split.encoded, session.pad_id, world, session.config.train.eval_batch_tokens, check_stop
        )
    except _StopError:
        return None
    finally:
        model.train()
    metrics = None if outputs is None else task.score(split.examples, outputs)
    return world.from_main(metrics)


class _StopError(Exception):
    """A stop was asked for, and all ranks know."""


def _due(every: int | None, step: int, plan: EpochPlan) -> bool:
    """Whether an evaluation is due after `step` steps: every so many, or at the end of an epoch."""
    return plan.locate(step)[1] == 0 if every is None else step % every == 0


def _count(speed: Speed, training: Split, indices: Any, seconds: float) -> None:
    if speed.first_step_at_s is None:
        speed.first_step_at_s = time.time()
        return
    encoded = training.encoded
    rows = [r for i in indices for r in range(*encoded.example_starts[i : i + 2])]
    lengths = encoded.lengths[rows]
    speed.step_s.append(seconds)
    speed.examples += len(indices)
    speed.tokens += int(lengths.sum())
    speed.padded_tokens += int(len(lengths) * lengths.max())


def _train_figures(done: Done, lane: LaneOptimizer, speed: Speed, epoch: int) -> dict[str, float]:
    figures = speed.figures()
    return {
        "train/loss": done.loss,
        "train/grad_norm": done.norm,
        "train/lr_factor": lane.factor,
        "train/epoch": epoch,
        "train/tokens_per_s": figures["tokens_per_s"] or 0.0,
        "train/samples_per_s": figures["samples_per_s"] or 0.0,
    }


def _note_evaluation(
    session: Session, position: Position, metrics: dict[str, float], best_adapter: Path
) -> None:
    """Keep the adapter if it is the best so far; end the run if none was for too long."""
    task, patience = session.task, session.config.train.patience
    position.last, position.evaluated_step = metrics, position.step
    value, best = metrics[task.main_metric], position.best.get(task.main_metric)
    if best is None or (value > best if task.greater_is_better else value < best):
        position.best, position.best_step, position.stale = metrics, position.step, 0
        if session.world.is_main:
            save_adapter(best_adapter, session.model.adapter, session.base.identity, task_card(session))
    else:
        position.stale += 1
        position.ended = patience is not None and position.stale >= patience


def _save(session: Session, lane: LaneOptimizer, folder: Path, position: Position) -> None:
    tensors = lane.state()
    rng = session.world.gather(checkpoint.rng_state())
    if session.world.is_main:
        assert rng is not None
        state = {
            "position": asdict(position),
            "identity": identity(session.config),
            "encoder_sha256": session.base.identity.sha256,
        }
        checkpoint.save(folder, Checkpoint(position.step, tensors, rng, state))
        checkpoint.prune(folder, session.config.train.keep_last, position.best_step)


def _resume(session: Session, lane: LaneOptimizer, saved: Checkpoint | None) -> Position:
    """Take up a saved state, if there is one."""
    if saved is None:
        return Position()
    found = session.base.identity
    if saved.state["encoder_sha256"] != found.sha256:
        raise UserError(
            f"the weights of encoder '{found.path}' have changed since step {saved.step} was saved: restore them, "
            "or give --train.resume false to start again"
        )
    lane.load(saved.tensors)
    if len(saved.rng) == session.world.size:
        torch.set_rng_state(saved.rng[session.world.rank])
    return Position(**saved.state["position"])
