"""`gpc-dist results`: finished runs side by side, from their folders alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from gpc_dist import files
from gpc_dist.errors import UserError


def results_table(folders: Sequence[Path]) -> str:
    """One line for each run and one for each task's majority baseline, the best run last.

    Raises:
        UserError: a folder holds no finished run.
    """
    runs = [_read(folder) for folder in folders]
    lines: list[list[Any]] = []
    for task in dict.fromkeys(run["task"] for run in runs):
        mine = [run for run in runs if run["task"] == task]
        metric = mine[0]["main_metric"]
        baseline = mine[0]["majority_baseline"][metric]
        lines.append([task, "(majority)", None, metric, baseline, 0, None, None])
        for run in sorted(mine, key=lambda run: run["metrics"]["best"][metric]):
            best = run["metrics"]["best"][metric]
            trained, frozen = run["trainable_parameters"], run["frozen_parameters"]
            lines.append([task, run["name"], run["method"], metric, best, trained, frozen, run["wall_s"]])
    headers = ["task", "run", "method", "metric", "best", "trained", "frozen", "seconds"]
    formats = ("", "", "", "", ".4f", ",", ",", ".0f")
    return tabulate(lines, headers=headers, floatfmt=formats, intfmt=formats)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "result.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no finished run: result.json is missing")
    return {"name": folder.name, **files.read_json(path)}
