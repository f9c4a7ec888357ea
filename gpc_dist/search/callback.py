"""Callback of Ray Tune: writes the decision on each trial, and restores a scheduler's state after a restart."""

from __future__ import annotations

import os
import signal
from typing import Any

from ray import tune
from ray.tune.schedulers import MedianStoppingRule, PopulationBasedTraining, TrialScheduler

from gpc_dist import files
from gpc_dist.runs.folder import SearchFolder
from gpc_dist.runs.metrics import TIME
from gpc_dist.search.trial import OVER, STEP
from gpc_dist.search.trial_files import trial_folder
from gpc_dist.training.stop import StopRequest


class TrialCallback(tune.Callback):
    """Writes the decision on each trial to its `trial.json`.

    When a search resumes, it first repeats the past evaluations to the scheduler: Ray Tune restores trials and
    searchers, but not a scheduler's state (the rungs of ASHA).

    Args:
        metric: its name in results, `val/<metric>`.
        stop: passed on to Ray Tune, whose trials then save their state.
    """

    def __init__(self, folder: SearchFolder, metric: str, scheduler: TrialScheduler, stop: StopRequest):
        self._folder, self._metric, self._scheduler, self._stop = folder, metric, scheduler, stop
        self._told = False

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self._stop.signal and callable(signal.getsignal(signal.SIGUSR1)):
            os.kill(os.getpid(), signal.SIGUSR1)  # at which Tune stops; it removes its handler then
        if not self._told:
            replay(self._folder, trials, self._scheduler, self._metric)
        self._told = True

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        over = bool((trial.last_result or {}).get(OVER))
        self._decide(trial, "completed" if over else "stopped by scheduler")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._decide(trial, "failed")

    def _decide(self, trial: Any, decision: str) -> None:
        file = trial_folder(self._folder, int(str(trial))).trial
        files.write_json(file, files.read_json(file) | {"decision": decision})


def replay(folder: SearchFolder, trials: list[Any], scheduler: TrialScheduler, metric: str) -> int:
    """Report the past evaluations of trials to a scheduler, in the order in which they were made.

    ASHA gets all of them. The median rule gets only those of finished trials: it fails when a trial that it stopped
    continues, which a trial does if its stop came too late for Ray Tune's records. PBT gets none, because it would
    copy trials during the replay; it compares them again at their next evaluation.

    Returns:
        Number of evaluations reported.
    """
    past = []
    for trial in trials:
        if isinstance(scheduler, PopulationBasedTraining):
            continue
        if isinstance(scheduler, MedianStoppingRule) and not trial.is_finished():
            continue
        lines, _ = files.read_lines(trial_folder(folder, int(str(trial))).metrics)
        past += [(line[TIME], trial, line) for line in lines if line.get(metric) is not None]
    for _, trial, line in sorted(past, key=lambda each: each[0]):
        result = {metric: line[metric], STEP: line["step"], "training_iteration": 1}
        scheduler.on_trial_result(_Past(), trial, result)  # type: ignore[arg-type]
    return len(past)


class _Past:
    """Replaces Ray Tune's controller during a replay, in which no trial waits for resources."""

    def get_live_trials(self) -> list[Any]:
        return []


def best_trial(folder: SearchFolder, metric: str, mode: str) -> tuple[str, float] | None:
    """Return the name and the value of the trial with the best adapter; None if no trial was evaluated."""
    found = []
    for path in sorted(folder.trials.iterdir()) if folder.trials.is_dir() else []:
        result = files.read_json(path / "result.json")
        value = result.get("metrics", {}).get("best", {}).get(metric)
        if value is not None and (path / "adapter").is_dir():
            found.append((path.name, float(value)))
    sign = 1 if mode == "max" else -1
    return max(found, key=lambda each: sign * each[1], default=None)
