"""Results in a study's folder, by task: scores on the official split, their cost, and the course of the search."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gpc_dist import files
from gpc_dist.config import build
from gpc_dist.errors import UserError
from gpc_dist.runs.records import Record, read_folder
from gpc_dist.study.choose import Tried, tried
from gpc_dist.study.layout import StudyFolder, TaskFolder, read_official
from gpc_dist.study.searches import Configuration
from gpc_dist.study.spec import StudySpec
from gpc_dist.study.statistics import draw_units, interval, resampled, units
from gpc_dist.tasks import Example, Task, judged, make_task
from gpc_dist.tasks.metrics import LOWER_IS_BETTER

LEARNT = 0.03
"""Margin by which the ceiling must be better than the majority baseline for a task to count in means."""
DRAWS = 1000
_MACHINE = ("cpu", "cpus", "memory_gib", "gpu", "gpus", "python", "versions")


@dataclass(frozen=True)
class FinalRun:
    """A run of a chosen configuration, measured on the official validation split."""

    seed: int
    score: float
    loss: float
    """The training loss, averaged over the split's examples."""
    holdout: float
    """Main metric of its best checkpoint on the hold-out."""
    decisions: np.ndarray
    """`[N]`: one for each example of the split."""
    parameters: int
    """Number of trained parameters."""
    adapter: Path
    """Its adapter's folder."""
    record: Record


@dataclass(frozen=True)
class SearchSpread:
    """Results of a method's search runs on the hold-out; no runs for a method with one configuration."""

    values: Sequence[float]
    """Main metric of each run that has one, the best first."""
    failed: int
    """Number of runs without a value: their loss was not finite, or they were killed."""
    at_majority: int
    """Number of runs that are no better than the majority baseline on the same rows: they did not learn."""
    cost_s: float
    """Rank-seconds of all runs whose cost is known."""

    @property
    def runs(self) -> int:
        return len(self.values) + self.failed

    @property
    def unstable(self) -> float:
        """Share of the runs that failed or did not learn; there must be some."""
        return (self.failed + self.at_majority) / self.runs


@dataclass(frozen=True)
class MethodResult:
    """Results of a method on a task."""

    search: SearchSpread
    configuration: Configuration | None
    """The chosen one; None if none could be chosen."""
    runs: Sequence[FinalRun]
    """Final runs in the order of their seeds, without failed ones."""

    @property
    def mean(self) -> float | None:
        return statistics.fmean(run.score for run in self.runs) if self.runs else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds."""
        return _std([run.score for run in self.runs])

    @property
    def loss(self) -> float | None:
        return statistics.fmean(run.loss for run in self.runs) if self.runs else None

    @property
    def loss_std(self) -> float | None:
        return _std([run.loss for run in self.runs])

    @property
    def cost_s(self) -> float | None:
        """Mean rank-seconds of a final run."""
        known = [run.record.cost_s for run in self.runs if run.record.cost_s is not None]
        return statistics.fmean(known) if known else None


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """A method's score minus the reference's, each the mean over its seeds."""

    mean: float
    draws: np.ndarray
    """The same difference for every bootstrap draw of the examples, float64 `[draws]`."""

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The ends between which the middle 95 % of the draws lie."""
        return interval(self.draws)


@dataclass(frozen=True)
class TaskResult:
    """Results of a task of a study."""

    name: str
    metric: str
    examples: int
    """Number of examples of the official validation split."""
    majority: float
    methods: Mapping[str, MethodResult]
    """Methods that have runs, by name, in the study's order."""
    differences: Mapping[str, Difference]
    """Difference from the study's reference, for every other method with final runs."""
    floor: float | None
    """Mean score of the study's floor."""
    ceiling: float | None
    on_gpu: bool
    machines: Sequence[Mapping[str, Any]]
    """Facts about the machines of the final runs, each machine once."""

    @property
    def sign(self) -> int:
        """1 if a larger score is better, else -1."""
        return -1 if self.metric in LOWER_IS_BETTER else 1

    @property
    def learnt(self) -> bool | None:
        """Whether the ceiling is better than the majority baseline by at least `LEARNT`; None without a ceiling."""
        if self.ceiling is None:
            return None
        return self.sign * (self.ceiling - self.majority) >= LEARNT

    def covered(self, method: str) -> float | None:
        """Share of the distance from the floor to the ceiling that a method covers; None if there is none."""
        mean = self.methods[method].mean
        if mean is None or self.floor is None or self.ceiling is None:
            return None
        distance = self.ceiling - self.floor
        return (mean - self.floor) / distance if self.sign * distance > 0 else None


@dataclass(frozen=True)
class StudyResult:
    """The results of a study so far."""

    study: StudySpec
    tasks: Sequence[TaskResult]
    """Tasks whose final runs have been measured."""
    missing: Sequence[str]
    """Tasks without measured final runs."""

    @property
    def searched(self) -> bool:
        """Whether any method has search runs."""
        return any(result.search.runs for task in self.tasks for result in task.methods.values())

    @property
    def counted(self) -> list[TaskResult]:
        """The tasks that count in means: all but those that the ceiling does not learn."""
        return [task for task in self.tasks if task.learnt is not False]

    def mean(self, method: str) -> float | None:
        """A method's mean score over the tasks that count; None if it lacks one of them."""
        found = [task.methods[method].mean for task in self.counted if method in task.methods]
        known = [value for value in found if value is not None]
        return statistics.fmean(known) if known and len(known) == len(self.counted) else None

    def mean_covered(self, method: str) -> float | None:
        """As `mean`, for the share of the distance from floor to ceiling (`covered`)."""
        found = [task.covered(method) for task in self.counted if method in task.methods]
        known = [value for value in found if value is not None]
        return statistics.fmean(known) if known and len(known) == len(self.counted) else None

    def mean_difference(self, method: str) -> Difference | None:
        """Mean difference from the reference over the tasks that count, draw by draw; None if one of them has none."""
        found = [task.differences.get(method) for task in self.counted]
        known = [difference for difference in found if difference is not None]
        if not known or len(known) < len(found):
            return None
        return Difference(
            statistics.fmean(each.mean for each in known), np.mean([each.draws for each in known], axis=0)
        )


def read_study(study: StudySpec) -> StudyResult:
    """Read the results of a study so far.

    Raises:
        UserError: there is nothing to report.
    """
    folder = StudyFolder(study.folder)
    found = {task: _read_task(study, folder.task(task), task) for task in study.tasks}
    tasks = [result for result in found.values() if result is not None]
    if not tasks:
        raise UserError(
            f"{folder.path} holds no task that was measured on its official validation split: run the study "
            "without --report-only"
        )
    return StudyResult(study, tasks, [task for task, result in found.items() if result is None])


def _read_task(study: StudySpec, folder: TaskFolder, name: str) -> TaskResult | None:
    """Read the results of a task; None if it has no measured runs."""
    if not folder.chosen.exists():
        return None
    chosen = {method: best["configuration"] for method, best in files.read_json(folder.chosen).items()}
    final = tried(folder, "final", {method: [each] for method, each in chosen.items()})
    measured = [run for run in final if read_official(run.folder.path)]
    if not measured:
        return None
    records = _records(folder)
    first = read_official(measured[0].folder.path)
    examples = judged.read_examples(first["examples"])
    searched = tried(folder, "search", files.read_json(folder.drawn))
    methods = {}
    for method in study.methods:
        mine = [run for run in searched if run.method == method]
        runs = [_final(run, records) for run in measured if run.method == method]
        if mine or runs:
            methods[method] = MethodResult(
                _spread(mine, records), chosen.get(method), sorted(runs, key=lambda run: run.seed)
            )
    tree = measured[0].folder.read_config()
    # not its engine: a DeepSpeed file that it names may be gone
    config = build({section: tree[section] for section in ("task", "data")})
    task = make_task(config.task, config.data)
    means = {method: result.mean for method, result in methods.items()}
    return TaskResult(
        name=name,
        metric=first["metric"],
        examples=len(examples),
        majority=first["majority_baseline"][first["metric"]],
        methods=methods,
        differences=_differences(study.reference, task, examples, methods),
        floor=means.get(study.floor),
        ceiling=means.get(study.ceiling),
        on_gpu=any(record.on_gpu for record in records.values()),
        machines=_machines(measured),
    )


def _machines(runs: Sequence[Tried]) -> list[dict[str, Any]]:
    """Return facts about the machines of these runs, each machine once."""
    found: list[dict[str, Any]] = []
    for run in runs:
        facts = files.read_json(run.folder.facts)
        machine = {fact: facts[fact] for fact in _MACHINE if fact in facts}
        if machine not in found:
            found.append(machine)
    return found


def _records(folder: TaskFolder) -> dict[str, Record]:
    """Read the record of every trial, by the trial's folder."""
    found: dict[str, Record] = {}
    for search in (*folder.searches("search"), *folder.searches("final")):
        if search.begun_trials():
            found |= {str(search.trials / record.name): record for record in read_folder(search.path)}
    return found


def _final(run: Tried, records: Mapping[str, Record]) -> FinalRun:
    found = read_official(run.folder.path)
    assert run.value is not None
    return FinalRun(
        seed=run.seed,
        score=found["metrics"][found["metric"]],
        loss=found["metrics"]["loss"],
        holdout=run.value,
        decisions=np.array([each["decision"] for each in found["examples"]]),
        parameters=run.result["trainable_parameters"],
        adapter=run.folder.adapter,
        record=records[str(run.folder.path)],
    )


def _spread(runs: Sequence[Tried], records: Mapping[str, Record]) -> SearchSpread:
    values = [run.value for run in runs if run.value is not None]
    sign = next((run.sign for run in runs if run.value is not None), 1)
    return SearchSpread(
        values=sorted(values, key=lambda value: -sign * value),
        failed=len(runs) - len(values),
        at_majority=sum(run.value is not None and not run.learnt for run in runs),
        cost_s=sum(records[str(run.folder.path)].cost_s or 0.0 for run in runs),
    )


def _differences(
    reference: str, task: Task, examples: Sequence[Example], methods: Mapping[str, MethodResult]
) -> dict[str, Difference]:
    """Return the difference of every other method from the reference, scored on the same draws of the examples."""
    held = {method: result for method, result in methods.items() if result.runs}
    if reference not in held:
        return {}
    metrics = task.metrics_of(task.main_metric)
    drawn = draw_units(len(units(examples)), DRAWS)
    scores = {
        method: resampled(metrics, examples, [run.decisions for run in result.runs], drawn)
        for method, result in held.items()
    }
    return {
        method: Difference(
            (result.mean or 0.0) - (held[reference].mean or 0.0), scores[method] - scores[reference]
        )
        for method, result in held.items()
        if method != reference
    }
