"""`gpc-dist results`: finished runs side by side, from their folders alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from gpc_dist.errors import UserError
from gpc_dist.runs.result import RunResult
from gpc_dist.shown import shown_cells
from gpc_dist.typed import is_number, read_as

log = logging.getLogger(__name__)


def results_table(folders: Sequence[Path]) -> str:
    """One line for each finished run and one for each task's majority baseline, the best run last.

    What is no finished run is left out, with a warning: a shell's `runs/*` gives everything that lies there.

    Raises:
        UserError: there is no finished run among them.
    """
    runs, others = [], []
    for folder in folders:
        try:
            runs.append(_read(folder))
        except UserError as error:
            others.append(str(error))
    if not runs:
        raise UserError("; ".join(others))
    for reason in others:
        log.warning("left out: %s", reason)
    lines: list[list[Any]] = []
    for task, metric in dict.fromkeys((run.task, run.metric) for run in runs):
        mine = [run for run in runs if (run.task, run.metric) == (task, metric)]
        lines.append([task, "(majority)", None, metric, mine[0].baseline, 0, None, None])
        for run in sorted(mine, key=lambda run: -math.inf if run.best is None else run.best):
            lines.append(
                [task, run.name, run.method, metric, run.best, run.trainable, run.frozen, run.wall_s]
            )
    headers = ["task", "run", "method", "metric", "best", "trained", "frozen", "seconds"]
    formats = ("", "", "", "", ".4f", ",", ",", ".0f")
    return tabulate(shown_cells(lines), headers=headers, floatfmt=formats, intfmt=formats)


class _Result(NamedTuple):
    name: str
    task: str
    method: str
    metric: str
    best: float | None
    """None if no evaluation gave a number."""
    baseline: float | None
    trainable: int
    frozen: int
    wall_s: float


def _read(folder: Path) -> _Result:
    path = folder / "result.json"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if not path.is_file():
        raise UserError(f"{folder} holds no finished run: result.json is missing")
    found = read_as(RunResult, path)
    if found is None or not found.main_metric:
        raise UserError(f"{path} is not the result of a run")
    best, baseline = (
        value if is_number(value := values.get(found.main_metric)) else None
        for values in (found.metrics.best, found.majority_baseline)
    )
    return _Result(
        name=folder.name,
        task=found.task,
        method=found.method,
        metric=found.main_metric,
        best=best,
        baseline=baseline,
        trainable=found.trainable_parameters,
        frozen=found.frozen_parameters,
        wall_s=found.wall_s,
    )
