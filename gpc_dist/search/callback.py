"""Callback of Ray Tune: writes the decision on each trial, and restores a scheduler's state after a restart."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import stopper
from ray.tune.result import DONE, TRAINING_ITERATION
from ray.tune.schedulers import MedianStoppingRule, PopulationBasedTraining, TrialScheduler

from gpc_dist import files
from gpc_dist.runs.folder import SearchFolder
from gpc_dist.search.past import Evaluation, evaluations
from gpc_dist.search.trial import OVER, STEP
from gpc_dist.search.trial_files import (
    COMPLETED,
    FAILED,
    STOPPED,
    Searches,
    folder_among,
    parse_name,
    read_trial,
)
from gpc_dist.shown import one_line
from gpc_dist.training.stop import StopRequest

log = logging.getLogger(__name__)


class TrialCallback(tune.Callback):
    """Writes the decisions on each trial to its `trial.json`, before Ray Tune acts on them: a trial that loses an
    evaluation on which there is none yet reports it again.

    When a search resumes, it first repeats the past evaluations to the scheduler and the stop rules.

    Args:
        metric: its name in results, `val/<metric>`; empty for searches that have none in common.
        stop: passed on to Ray Tune, whose trials then save their state.
    """

    def __init__(
        self,
        searches: Searches,
        metric: str,
        scheduler: TrialScheduler,
        rules: Sequence[stopper.Stopper],
        stop: StopRequest,
    ):
        self._searches, self._metric, self._scheduler = searches, metric, scheduler
        self._rules, self._stop = rules, stop
        self._known: set[str] = set()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self._stop.signal and callable(signal.getsignal(signal.SIGUSR1)):
            os.kill(os.getpid(), signal.SIGUSR1)  # at which Tune stops; it removes its handler then
        # those that the last step added; none of them has been evaluated since
        new = [trial for trial in trials if trial.trial_id not in self._known]
        replay(self._searches, new, self._scheduler, self._metric, self._rules)
        self._known |= {trial.trial_id for trial in new}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        noted: dict[str, Any] = {"heard": result[STEP]}
        if result.get(DONE):
            noted["decision"] = COMPLETED if result[OVER] else STOPPED
        self._note(trial, **noted)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        over = bool((trial.last_result or {}).get(OVER))
        self._note(trial, decision=COMPLETED if over else STOPPED)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._note(trial, decision=FAILED)
        run = folder_among(self._searches, str(trial))
        if run.read_status().state != "failed":  # its process was lost, not its run
            run.write_status("failed", _reason(trial))
        log.warning("trial %s failed: %s", trial, run.read_status().reason)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        log.warning("trial %s is tried again: %s", trial, _reason(trial))

    def _note(self, trial: Any, **noted: Any) -> None:
        file = folder_among(self._searches, str(trial)).trial
        files.write_json(file, files.read_json(file) | noted)


def _reason(trial: Any) -> str:
    """Why a trial failed, in one line: Ray Tune notes errors with their stacks, and with what may have led to them."""
    *_, last = Path(trial.error_file).read_text(encoding="utf-8").strip().splitlines()
    return one_line(last.partition(" Worker exit type:")[0])


def replay(
    searches: Searches,
    trials: Sequence[Any],
    scheduler: TrialScheduler,
    metric: str,
    rules: Sequence[stopper.Stopper] = (),
) -> int:
    """Report the past evaluations of trials to a scheduler and to stop rules, in the order in which they were made.

    ASHA gets all of them. The median rule gets only those of finished trials: it fails when a trial that it stopped
    continues, which a trial does if its stop came too late for Ray Tune's records. PBT gets none, because it would
    copy trials during the replay; it compares them again at their next evaluation.

    Returns:
        Number of evaluations reported to the scheduler.
    """
    past: list[tuple[Evaluation, Any, bool]] = []
    for trial in trials:
        search, number = parse_name(str(trial))
        found = evaluations(folder_among(searches, str(trial)).metrics, metric)
        record = read_trial(searches[search], number)
        if (
            record is not None and record.heard is not None and not trial.is_finished()
        ):  # others it reports again
            found = [each for each in found if each.step <= record.heard]
        past += [(each, trial, each is found[-1]) for each in found]
    told = 0
    for each, trial, last in sorted(past, key=lambda found: found[0].time_s):
        result = {metric: each.value, STEP: each.step, TRAINING_ITERATION: 1}
        if _can_hear(scheduler, trial):
            scheduler.on_trial_result(_Past(), trial, dict(result))  # type: ignore[arg-type]
            told += 1
        for rule in rules:
            rule(trial.trial_id, result)
            if last and trial.is_finished() and isinstance(rule, tune.Callback):
                rule.on_trial_complete(0, [], trial)
    return told


def _can_hear(scheduler: TrialScheduler, trial: Any) -> bool:
    if isinstance(scheduler, MedianStoppingRule):
        return bool(trial.is_finished())
    return not isinstance(scheduler, PopulationBasedTraining)


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
