"""Ray Tune's callback: writes what became of each trial, and restores a scheduler's memory after a restart."""

from __future__ import annotations

from typing import Any

from ray import tune
from ray.tune.schedulers import MedianStoppingRule, PopulationBasedTraining, TrialScheduler

from gpc_dist import files
from gpc_dist.runs.folder import SearchFolder
from gpc_dist.runs.metrics import TIME
from gpc_dist.search.trial import OVER, STEP, trial_number
from gpc_dist.search.trial_files import trial_folder


class TrialCallback(tune.Callback):
    """Writes down what became of each trial.

    At the start of a search that goes on it also tells the scheduler again what it was told before: Ray Tune
    restores trials and searchers, but a scheduler's memory (the rungs of ASHA) is lost.

    Args:
        metric: as it stands in results.
    """

    def __init__(self, folder: SearchFolder, metric: str, scheduler: TrialScheduler):
        self._folder, self._metric, self._scheduler = folder, metric, scheduler
        self._told = False

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if not self._told:
            replay(self._folder, trials, self._scheduler, self._metric)
        self._told = True

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        over = bool((trial.last_result or {}).get(OVER))
        self._decide(trial, "completed" if over else "stopped by scheduler")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._decide(trial, "failed")

    def _decide(self, trial: Any, decision: str) -> None:
        file = trial_folder(self._folder, trial_number(trial.trial_id)).trial
        files.write_json(file, files.read_json(file) | {"decision": decision})


def replay(folder: SearchFolder, trials: list[Any], scheduler: TrialScheduler, metric: str) -> int:
    """Tell a scheduler of the evaluations that trials have made, in the order in which they were made.

    ASHA hears of all. The median rule hears of trials that have ended: it breaks down when one that it stopped goes
    on, as one does whose stop came too late for Ray Tune's records. PBT hears of none, because it would copy trials
    while it listens; it compares them anew at their next evaluation.

    Returns:
        How many it was told of.
    """
    past = []
    for trial in trials:
        if isinstance(scheduler, PopulationBasedTraining):
            continue
        if isinstance(scheduler, MedianStoppingRule) and not trial.is_finished():
            continue
        lines, _ = files.read_lines(trial_folder(folder, trial_number(trial.trial_id)).metrics)
        past += [(line[TIME], trial, line) for line in lines if line.get(metric) is not None]
    for _, trial, line in sorted(past, key=lambda each: each[0]):
        result = {metric: line[metric], STEP: line["step"], "training_iteration": 1}
        scheduler.on_trial_result(_Past(), trial, result)  # type: ignore[arg-type]
    return len(past)


class _Past:
    """Stands for Ray Tune's controller while a scheduler hears of the past: nobody waits for a turn."""

    def get_live_trials(self) -> list[Any]:
        return []


def best_trial(folder: SearchFolder, metric: str, mode: str) -> tuple[str, float] | None:
    """Name and best value of the trial whose adapter is best; None if none was evaluated."""
    found = []
    for path in sorted(folder.trials.iterdir()) if folder.trials.is_dir() else []:
        result = files.read_json(path / "result.json")
        value = result.get("metrics", {}).get("best", {}).get(metric)
        if value is not None and (path / "adapter").is_dir():
            found.append((path.name, float(value)))
    sign = 1 if mode == "max" else -1
    return max(found, key=lambda each: sign * each[1], default=None)
