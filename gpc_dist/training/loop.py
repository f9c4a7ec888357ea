"""The training loop of one run: reads top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpc_dist.training.evaluation import all_outputs
from gpc_dist.training.lane_run import LaneRun, Position, Speed
from gpc_dist.training.progress import Progress
from gpc_dist.training.session import Session, Split
from gpc_dist.training.step import backward, finish, prepare
from gpc_dist.training.stop import StopRequest


@dataclass(frozen=True)
class Outcome:
    """How the loop ended."""

    position: Position
    speed: Speed
    stopped_by: str | None
    """The signal that asked for the stop; None when the run is complete."""


def train(run: LaneRun, stop: StopRequest) -> Outcome:
    """Train a session's only lane until its steps are done, early stopping ends it, or a stop is asked for.

    Raises:
        UserError: the loss stays non-finite.
    """
    session, world = run.session, run.session.world

    def evaluated() -> bool:
        """Evaluate what was reached; whether no stop cut it short."""
        metrics = evaluate(session, run.validation, lambda: stop.signal is not None)
        if metrics is None:
            return False
        run.note_evaluation(metrics[0])
        main = session.task.main_metric
        progress.show(run.position.step, {f"val/{main}": metrics[0][main]})
        return True

    def outcome(stopped: bool) -> Outcome:
        signal = (world.from_main(stop.signal) or "a signal on another rank") if stopped else None
        return Outcome(run.position, run.speed, signal)

    session.model.train()
    with stop, Progress(run.total, run.position.step, world.is_main) as progress:
        if run.evaluation_due:  # the stop of an earlier start came before it
            if not evaluated():
                return outcome(stopped=True)
            run.save()
        step = prepare(session, [run.next_work()])
        while not run.over:
            started_s = time.monotonic()
            run.set_rate()
            losses = backward(session, step)
            following = prepare(session, [run.next_work()])  # while the GPU works on this one
            (done,), stopping = finish(session, [run.optimizer], losses, flag=stop.signal is not None)
            figures = run.count_step(step.works[0], done, time.monotonic() - started_s)
            if figures:
                shown = {"loss": done.loss, "tokens/s": figures["train/tokens_per_s"]}
                progress.show(run.position.step, shown)
            progress.step()

            due = run.evaluation_due and not stopping
            stopping = stopping or (due and not evaluated())
            if run.save_due(evaluated=due and not stopping) or stopping:
                run.save()
            if stopping:
                return outcome(stopped=True)
            step = following
    return outcome(stopped=False)


def evaluate(
    session: Session, split: Split, stop: Callable[[], bool] = lambda: False
) -> list[dict[str, float]] | None:
    """Every metric of the task on a split and its mean `loss`, for every lane and on every rank.

    Args:
        stop: whether this rank wants the evaluation to end; if any does, the result is None on all.
    """
    model, task, world = session.model, session.task, session.world

    def check_stop() -> None:
        if world.sum(torch.tensor(float(stop()), device=world.device)) > 0:
            raise _StopError

    model.eval()
    try:
        tokens = session.config.train.eval_batch_tokens
        outputs = all_outputs(model, split.encoded, session.pad_id, world, tokens, check_stop)
    except _StopError:
        return None
    finally:
        model.train()
    metrics = None if outputs is None else [task.measure(split.examples, lane) for lane in outputs]
    return world.from_main(metrics)


class _StopError(Exception):
    """A stop was asked for, and all ranks know."""
