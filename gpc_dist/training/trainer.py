"""The training loop: K >= 1 runs, each trained as it would be alone. Those of one encoder share its passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from gpc_dist.errors import UserError
from gpc_dist.training.evaluation import evaluate
from gpc_dist.training.progress import Event
from gpc_dist.training.run import Run
from gpc_dist.training.step import Step, backward, finish, prepare

StepCallback = Callable[[Run, dict[str, float] | None], None]
"""Takes a run that has made a step, and the step's metrics if they were logged."""


def _never() -> bool:
    return False


class Trainer:
    """Trains runs together. Every rank makes the same calls in the same order; the runs may differ between calls.

    Runs of several encoders (see `pack.Pack`) make their steps together too: each encoder runs its passes, and what
    the ranks exchange for an update is exchanged once for all.

    Args:
        stop: returns whether this rank was asked to stop.
        on_step: called for each run after each of its steps.
    """

    def __init__(self, stop: Callable[[], bool] = _never, on_step: StepCallback | None = None):
        self._stop, self._on_step = stop, on_step
        self._prefetched: tuple[Sequence[Run], list[Step]] | None = None
        self.stopped = False
        """A rank was asked to stop: all ranks have stopped and saved the runs' states."""

    def advance(self, runs: Sequence[Run], pause: Callable[[], bool] = _never) -> list[Event]:
        """Train until one of these runs is evaluated, ends or fails, or until any rank stops or pauses.

        Args:
            pause: returns whether this rank wants `advance` to return after the current step; a pause saves nothing.
        """
        # the evaluation of a resumed run may be due: it was stopped before that
        events = self._settle(runs, stepped=False)
        paused = not runs
        while not (events or paused or self.stopped):
            failed, paused = self._step(runs, pause)
            events = [*failed, *self._settle([run for run in runs if not run.failure], stepped=True)]
        return events

    def _step(self, runs: Sequence[Run], pause: Callable[[], bool]) -> tuple[list[Event], bool]:
        """Make one step of all runs. Returns the events of runs that failed, and whether any rank stops or pauses."""
        started_s, groups = time.monotonic(), _by_encoder(runs)
        steps = self._next_steps(runs)
        for run in runs:
            run.begin_step()
        losses, passes_s = [], []
        for group, step in zip(groups, steps, strict=True):
            begun_s = time.monotonic()
            losses.append(backward(group[0].session, [run.optimizer for run in group], step))
            passes_s.append(time.monotonic() - begun_s)
        self._prefetched = runs, _prepare(groups)  # while the GPU works on this one
        flag = self._stop() or pause()
        runs = [run for group in groups for run in group]
        session, optimizers = runs[0].session, [run.optimizer for run in runs]
        done, flagged = finish(session, optimizers, torch.cat(losses), flag)
        self.stopped = flagged and session.world.any(self._stop())
        step_s = time.monotonic() - started_s

        common_s = (step_s - sum(passes_s)) / len(runs)
        for group, step, spent_s in zip(groups, steps, passes_s, strict=True):
            work = [lane.work for lane in step.lanes]
            for run, own in zip(group, work, strict=True):
                run.position.share_s += common_s + spent_s * own / sum(work)
        failed = []
        lanes = [lane for step in steps for lane in step.lanes]
        for run, examples, result in zip(runs, lanes, done, strict=True):
            try:
                figures = run.finish_step(examples, result, step_s)
            except UserError as error:
                run.failure = str(error)
                failed.append(Event(run.name, run.position.step, {}, over=True, failure=run.failure))
            else:
                if self._on_step:
                    self._on_step(run, figures)
        return failed, flagged

    def _next_steps(self, runs: Sequence[Run]) -> list[Step]:
        if self._prefetched is not None and self._prefetched[0] == runs:
            return self._prefetched[1]
        return _prepare(_by_encoder(runs))

    def _settle(self, runs: Sequence[Run], stepped: bool) -> list[Event]:
        """Evaluate and save the runs that are due. Returns the events of runs that were evaluated or are complete, and
        those that were lost."""
        evaluated = [] if self.stopped else self._evaluate([run for run in runs if run.evaluation_due])
        for run in runs:
            due = self.stopped or run.save_due(run in evaluated) if stepped else run in evaluated
            if due:
                run.save()
        told = [run for run in runs if run in evaluated or run.complete or run.unheard]
        for run in told:
            run.unheard = False
        return [Event(run.name, run.position.step, run.position.last, over=run.complete) for run in told]

    def _evaluate(self, runs: Sequence[Run]) -> list[Run]:
        """Evaluate runs, those with the same split together. Returns the evaluated ones: a stop skips the others."""
        evaluated: list[Run] = []
        for split in {id(run.validation): run.validation for run in runs}.values():
            together = [run for run in runs if run.validation is split]
            started_s = time.monotonic()
            adapters = [run.adapter for run in together]
            found = evaluate(together[0].session, adapters, split, self._stop)
            if found is None:
                self.stopped = True
                break
            share_s = (time.monotonic() - started_s) / len(together)
            for run, evaluation in zip(together, found, strict=True):
                run.finish_evaluation(evaluation)
                run.position.share_s += share_s
            evaluated += together
        return evaluated


def _by_encoder(runs: Sequence[Run]) -> list[list[Run]]:
    groups: dict[int, list[Run]] = {}
    for run in runs:
        groups.setdefault(id(run.session.model), []).append(run)
    return list(groups.values())


def _prepare(groups: Sequence[Sequence[Run]]) -> list[Step]:
    """The next step of each encoder's runs."""
    return [prepare(group[0].session, [run.next_examples for run in group]) for group in groups]
