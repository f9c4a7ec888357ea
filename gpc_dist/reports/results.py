"""`gpc-dist results`: finished runs side by side, from their folders alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from gpc_dist.errors import UserError
from gpc_dist.runs.result import read_result
from gpc_dist.shown import shown_cells

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
            runs.append((folder.name, read_result(folder)))
        except UserError as error:
            others.append(str(error))
    if not runs:
        raise UserError("; ".join(others))
    for reason in others:
        log.warning("left out: %s", reason)
    lines: list[list[Any]] = []
    for task, metric in dict.fromkeys((run.task, run.main_metric) for _, run in runs):
        mine = [(name, run) for name, run in runs if (run.task, run.main_metric) == (task, metric)]
        lines.append([task, "(majority)", None, metric, mine[0][1].baseline, 0, None, None])
        for name, run in sorted(mine, key=lambda each: -math.inf if each[1].best is None else each[1].best):
            trained, frozen = run.trainable_parameters, run.frozen_parameters
            lines.append([task, name, run.method, metric, run.best, trained, frozen, run.wall_s])
    headers = ["task", "run", "method", "metric", "best", "trained", "frozen", "seconds"]
    formats = ("", "", "", "", ".4f", ",", ",", ".0f")
    return tabulate(shown_cells(lines), headers=headers, floatfmt=formats, intfmt=formats)
