"""The best of several finished runs, for each task."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpc_dist.errors import UserError
from gpc_dist.runs.folder import RunFolder
from gpc_dist.runs.result import RunResult, read_result
from gpc_dist.schema import mapping
from gpc_dist.tasks.metrics import LOWER_IS_BETTER

log = logging.getLogger(__name__)

_MEASURED_ON = ("holdout", "limit_eval")
"""Keys of `data` that say which examples a run's figure is of."""


@dataclass(frozen=True)
class Finished:
    """A finished run with a figure."""

    folder: RunFolder
    metric: str
    value: float
    measured_on: str
    """In words, if it is not the whole validation split."""


def best_runs(folders: Sequence[Path], tasks: Collection[str]) -> dict[str, Finished]:
    """The best run of each task, by the main metric of its best evaluation.

    What is no finished run of these tasks is left out, with a warning: a shell's `runs/*` gives everything there.

    Raises:
        UserError: there is none; or the figures of a task's runs cannot be compared.
    """
    found: dict[str, list[Finished]] = {}
    others = []
    for folder in folders:
        try:
            result = read_result(folder)
            found.setdefault(result.task, []).append(_finished(folder, result, tasks))
        except UserError as error:
            others.append(str(error))
    if not found:
        raise UserError("; ".join(others))
    for reason in others:
        log.warning("left out: %s", reason)
    return {task: _best(task, runs) for task, runs in found.items() if runs}


def _finished(folder: Path, result: RunResult, tasks: Collection[str]) -> Finished:
    if result.task not in tasks:
        raise UserError(f"{folder} is a run of task '{result.task}', which is none of {', '.join(tasks)}")
    if result.best is None:
        raise UserError(f"{folder} has no evaluation with a {result.main_metric}")
    run = RunFolder(folder)
    data = mapping("data", run.read_config().get("data"))
    measured_on = ", ".join(f"data.{key} {data[key]}" for key in _MEASURED_ON if data.get(key) is not None)
    return Finished(run, result.main_metric, result.best, measured_on)


def _best(task: str, runs: Sequence[Finished]) -> Finished:
    ways = {(run.metric, run.measured_on) for run in runs}
    if len(ways) > 1:
        shown = "; ".join(sorted(f"{metric} {on}".rstrip() for metric, on in ways))
        raise UserError(
            f"the runs of task {task} are measured in different ways ({shown}), so none is the best: give runs that "
            "are measured alike"
        )
    sign = -1 if runs[0].metric in LOWER_IS_BETTER else 1
    return max(runs, key=lambda run: sign * run.value)
