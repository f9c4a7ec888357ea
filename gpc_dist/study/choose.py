"""The trials of a study by method, and the best configuration of each method on the hold-out."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpc_dist import files
from gpc_dist.runs.folder import TrialFolder
from gpc_dist.search import spec
from gpc_dist.study.layout import Stage, TaskFolder
from gpc_dist.study.searches import Configuration, configuration_of, identity
from gpc_dist.tasks.metrics import LOWER_IS_BETTER


@dataclass(frozen=True)
class Tried:
    """A trial and its result on the hold-out."""

    folder: TrialFolder
    method: str
    configuration: Configuration
    seed: int
    result: Mapping[str, Any]
    """Its `result.json`; empty for a trial that failed or was killed."""

    @property
    def metric(self) -> str:
        """Name of the task's main metric; only for a trial with a result."""
        return self.result["main_metric"]

    @property
    def value(self) -> float | None:
        """The main metric at the best checkpoint; None without a result, or if the metric is not finite."""
        found = self.result.get("metrics", {}).get("best", {}).get(self.result.get("main_metric"))
        return found if isinstance(found, int | float) and math.isfinite(found) else None

    @property
    def learnt(self) -> bool:
        """Whether it is better than the majority baseline on the same rows."""
        value = self.value
        return value is not None and self.sign * (value - self.result["majority_baseline"][self.metric]) > 0

    @property
    def sign(self) -> int:
        """1 if a larger value is better, else -1."""
        return -1 if self.result.get("main_metric") in LOWER_IS_BETTER else 1


def tried(folder: TaskFolder, stage: Stage, methods: Mapping[str, Sequence[Configuration]]) -> list[Tried]:
    """Return the trials of a stage.

    Args:
        methods: the configurations of each method, which identify a trial's method. A trial of another one is left out.
    """
    known = {identity(each): (name, each) for name, group in methods.items() for each in group}
    found = []
    for search in folder.searches(stage):
        specified = spec.load(str(search.config))
        for trial in search.begun_trials():
            settings = configuration_of(specified, files.read_json(trial.trial)["settings"])
            if (ours := identity(settings)) not in known:
                continue
            method, configuration = known[ours]
            failed = trial.read_status().state == "failed"
            result = {} if failed else files.read_json(trial.result)
            seed = trial.read_config()["run"]["seed"]
            found.append(Tried(trial, method, configuration, seed, result))
    return found


def choose(trials: Sequence[Tried], seeds: int) -> dict[str, dict[str, Any]]:
    """Choose the best configuration of each method that has one, by the mean over its seeds.

    Args:
        seeds: number of seeds of each configuration. A configuration with a failed seed is not chosen.
    """
    groups: dict[str, dict[str, list[Tried]]] = defaultdict(lambda: defaultdict(list))
    for each in trials:
        groups[each.method][identity(each.configuration)].append(each)
    chosen = {}
    for method, configurations in groups.items():
        whole = [
            (values, runs)
            for runs in configurations.values()
            if len(values := [run.value for run in runs if run.value is not None]) == seeds
        ]
        if whole:
            values, runs = max(whole, key=lambda each: each[1][0].sign * statistics.fmean(each[0]))
            chosen[method] = {
                "configuration": runs[0].configuration,
                "metric": runs[0].metric,
                "holdout": statistics.fmean(values),
            }
    return chosen
