"""`gpc-dist compare`: runs grouped into configurations, the configurations ranked by their metric.

Runs that differ only in seed, name and folder are one configuration. Tasks are not comparable with each other,
so there is one comparison for each task and the metric that selected its checkpoints.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tabulate import tabulate

from gpc_dist.errors import UserError
from gpc_dist.runs.records import Record, read_folder
from gpc_dist.shown import shown
from gpc_dist.tasks.metrics import LOWER_IS_BETTER
from gpc_dist.tracking.experiment import read_experiment
from gpc_dist.typed import is_number

_LONGEST = 28
"""Most characters of a value in a table or a plot."""


@dataclass(frozen=True)
class Configuration:
    """Runs with the same settings, one for each seed."""

    runs: Sequence[Record]
    """In the order of their seeds."""
    values: Sequence[float]
    """The metric of each run that has one."""

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.runs[0].settings)

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds; None for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def state(self) -> str:
        """The state of its runs, or the number of runs in each state."""
        counts = Counter(run.state for run in self.runs)
        if len(counts) == 1:
            return next(iter(counts))
        return ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))

    @property
    def seconds(self) -> float | None:
        """Mean wall-clock time of its runs."""
        return _mean(run.wall_s for run in self.runs)

    @property
    def cost_s(self) -> float | None:
        """Mean GPU-seconds (or seconds of CPU processes) of its runs."""
        return _mean(run.cost_s for run in self.runs)

    @property
    def energy_j(self) -> float | None:
        return _mean(run.energy_j for run in self.runs)

    @property
    def device(self) -> str:
        """The kind of device whose seconds `cost_s` counts."""
        return "GPU" if all(run.on_gpu for run in self.runs) else "CPU"

    def baseline(self, metric: str) -> float | None:
        return _mean(run.baseline.get(metric) for run in self.runs)


@dataclass(frozen=True)
class Comparison:
    """The configurations of one task, ranked by one metric."""

    task: str
    metric: str
    configurations: Sequence[Configuration]
    """The best first; those without a value last."""

    @property
    def greater_is_better(self) -> bool:
        return self.metric not in LOWER_IS_BETTER

    @property
    def ranked(self) -> list[Configuration]:
        """The configurations that have a value."""
        return [configuration for configuration in self.configurations if configuration.values]

    @property
    def runs(self) -> list[Record]:
        return [run for configuration in self.configurations for run in configuration.runs]

    @cached_property
    def varied(self) -> dict[str, str]:
        """Dotted key -> short name of each setting in which the configurations differ.

        The short name is the last part of the key, or the whole key where two would be the same.
        """
        keys = dict.fromkeys(key for c in self.configurations for key in c.settings)
        varied = [
            key for key in keys if len({_identity(c.settings.get(key)) for c in self.configurations}) > 1
        ]
        last = Counter(key.rpartition(".")[2] for key in varied)
        return {key: short if last[short := key.rpartition(".")[2]] == 1 else key for key in varied}

    @property
    def baseline(self) -> float | None:
        """Mean of the runs' majority baselines."""
        return _mean(run.baseline.get(self.metric) for run in self.runs)


def compare(place: str, metric: str | None = None, uri: str | None = None) -> list[Comparison]:
    """One comparison for each task and main metric of the runs at a place.

    Args:
        place: a folder of runs, a search's folder, or else the name of an MLflow experiment.
        metric: rank by this metric, at the checkpoint that the main metric selected.
        uri: MLflow tracking store; if given, `place` is an experiment even if a folder has its name.

    Raises:
        UserError: no runs at the place, or none with this metric.
        MachineError: the tracking store cannot be reached.
    """
    is_folder = uri is None and Path(place).is_dir()
    records = read_folder(Path(place)) if is_folder else read_experiment(place, uri)
    tasks: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        main = metric or record.main_metric or _usual_metric(records, record.task)
        tasks.setdefault((record.task, main), []).append(record)
    known = sorted({name for record in records for name in record.best})
    if metric and metric not in known:
        raise UserError(
            f"no run in {place} has the metric '{metric}': "
            + (f"give --metric one of {', '.join(known)}" if known else "none has been evaluated yet")
        )
    return [_comparison(task, main, runs) for (task, main), runs in sorted(tasks.items())]


def _usual_metric(records: Iterable[Record], task: str) -> str:
    """The main metric of a task's other runs, for a run that was not evaluated yet."""
    names = [record.main_metric for record in records if record.task == task and record.main_metric]
    return Counter(names).most_common(1)[0][0] if names else "metric"


def _comparison(task: str, metric: str, runs: Iterable[Record]) -> Comparison:
    groups: dict[str, dict[int, Record]] = {}
    for run in sorted(
        runs, key=lambda run: (metric in run.best, run.state.startswith("finished"), run.started_s)
    ):
        # one run for each seed: a repetition tells nothing about the spread over seeds. A run with a value
        # is preferred, then a finished one, then the last one.
        groups.setdefault(_identity(run.settings), {})[run.seed] = run
    found = []
    for group in groups.values():
        mine = [group[seed] for seed in sorted(group)]
        found.append(Configuration(mine, [run.best[metric] for run in mine if metric in run.best]))
    sign = 1 if metric in LOWER_IS_BETTER else -1

    def rank(configuration: Configuration) -> tuple[float, str]:
        mean = configuration.mean
        return math.inf if mean is None else sign * mean, configuration.runs[0].name

    return Comparison(task, metric, sorted(found, key=rank))


def _identity(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def show(value: Any) -> str:
    """A setting's value as one would write it on the command line, numbers rounded."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def shorten(text: str, longest: int = _LONGEST) -> str:
    """`text` without its middle if it is too long: paths differ at their ends."""
    if len(text) <= longest:
        return text
    head = longest // 3
    return f"{text[:head]}…{text[head + 1 - longest :]}"


def show_score(configuration: Configuration) -> str:
    """Mean and standard deviation over the seeds; the mean alone for one seed, a dash for none."""
    if configuration.mean is None:
        return "-"
    spread = "" if configuration.std is None else f" ± {configuration.std:.4f}"
    return f"{configuration.mean:.4f}{spread}"


def show_seeds(configuration: Configuration) -> str:
    """The number of seeds in the score, and of how many if some have no value yet."""
    scored, all_ = len(configuration.values), len(configuration.runs)
    return str(all_) if scored == all_ else f"{scored} of {all_}"


def show_cost(configuration: Configuration) -> str:
    """Such as `412 GPU-s`."""
    cost_s = configuration.cost_s
    return "-" if cost_s is None else f"{cost_s:,.0f} {configuration.device}-s"


def show_number(value: float | None, form: str) -> str:
    """The number in this format; a dash if it is not known."""
    return "-" if value is None else format(value, form)


@dataclass(frozen=True)
class Column:
    """A column of the table, in the terminal and in the page."""

    name: str
    text: Callable[[Configuration], str]
    order: Callable[[Configuration], Any]
    """Sort key: a number, a text or None."""

    def is_numeric(self, configurations: Iterable[Configuration]) -> bool:
        """Whether all known values of the column are numbers."""
        known = [value for c in configurations if (value := self.order(c)) is not None]
        return bool(known) and all(map(is_number, known))


def columns(comparison: Comparison) -> list[Column]:
    """The columns of a comparison; energy only if a run measured it."""

    def setting(key: str, name: str) -> Column:
        return Column(name, lambda c: show(c.settings.get(key)), lambda c: c.settings.get(key))

    metric = comparison.metric
    found = [
        *(setting(key, name) for key, name in comparison.varied.items()),
        Column("seeds", show_seeds, lambda c: len(c.values)),
        Column(metric, show_score, lambda c: c.mean),
        Column(
            "majority",
            lambda c: show_number(c.baseline(metric), ".4f"),
            lambda c: c.baseline(metric),
        ),
        Column("state", lambda c: c.state, lambda c: c.state),
        Column("seconds", lambda c: show_number(c.seconds, ",.0f"), lambda c: c.seconds),
        Column("cost", show_cost, lambda c: c.cost_s),
    ]
    if any(c.energy_j is not None for c in comparison.configurations):
        found.append(
            Column(
                "energy, kJ",
                lambda c: show_number(None if c.energy_j is None else c.energy_j / 1000, ",.1f"),
                lambda c: c.energy_j,
            )
        )
    return found


def comparison_table(comparison: Comparison) -> str:
    """A line that names the task, and below it one line for each configuration, the best first."""
    found = columns(comparison)
    lines = [[shorten(shown(column.text(c))) for column in found] for c in comparison.configurations]
    numbered = [[str(number), *line] for number, line in enumerate(lines, start=1)]
    table = tabulate(
        numbered,
        headers=["", *(shown(column.name) for column in found)],
        colalign=["right"] + ["right" if c.is_numeric(comparison.configurations) else "left" for c in found],
        disable_numparse=True,
    )
    return f"{shown(summary(comparison))}\n\n{table}"


def summary(comparison: Comparison) -> str:
    """Such as `rte: 12 configurations, 36 runs, by accuracy (higher is better)`."""
    direction = "higher" if comparison.greater_is_better else "lower"
    return (
        f"{comparison.task}: {counted(len(comparison.configurations), 'configuration')}, "
        f"{counted(len(comparison.runs), 'run')}, by {comparison.metric} ({direction} is better)"
    )


def counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"
