"""A study's results in a few lines for the terminal, and what to do with them next."""

from __future__ import annotations

import shlex
from pathlib import Path

from tabulate import tabulate

from gpc_dist.reports.comparison import show_number
from gpc_dist.study.layout import StudyFolder
from gpc_dist.study.results import StudyResult, TaskResult
from gpc_dist.study.searches import tracking_of
from gpc_dist.tracking.store import tracking_uri, ui_command

_BAR = 30
"""Characters of the longest bar."""


def summary(found: StudyResult) -> str:
    """A table with bars for each task, and three commands."""
    return "\n\n".join([*(_table(found, task) for task in found.tasks), _next(found)])


def _table(found: StudyResult, task: TaskResult) -> str:
    ends = [result.mean for result in task.methods.values() if result.mean is not None]
    longest = max((task.sign * (end - task.majority) for end in ends), default=0.0)
    lines = []
    for name, result in task.methods.items():
        score, bar = "failed", ""
        if result.mean is not None:
            spread = "" if result.std is None else f" ± {result.std:.4f}"
            score = f"{result.mean:.4f}{spread}"
            gain = task.sign * (result.mean - task.majority)
            bar = "█" * round(_BAR * gain / longest) if gain > 0 else ""
        difference = task.differences.get(name)
        gap = ""
        if difference is not None:
            low, high = difference.interval
            gap = f"{difference.mean:+.4f} [{low:+.4f}, {high:+.4f}]"
        parameters = f"{result.runs[0].parameters:,}" if result.runs else "-"
        lines.append([name, score, gap, parameters, show_number(result.cost_s, ",.0f"), bar])
    unit = "GPU-s" if task.on_gpu else "CPU-s"
    columns = ["method", task.metric, f"minus {found.study.reference}", "trained", f"{unit} a run", ""]
    align = ["left", "left", "left", "right", "right", "left"]
    table = tabulate(lines, columns, disable_numparse=True, colalign=align)
    return (
        f"{task.name}: {task.examples:,} validation rows, mean ± standard deviation over "
        f"{len(found.study.seeds)} seeds; bars begin at the majority baseline ({task.majority:.4f})\n{table}"
    )


def _next(found: StudyResult) -> str:
    """Commands for the best adapter of the first task."""
    task = found.tasks[0]
    runs = [run for result in task.methods.values() for run in result.runs]
    best = max(runs, key=lambda run: task.sign * run.score)
    adapter = shlex.quote(str(_shown(best.adapter)))
    report = StudyFolder(found.study.folder).report / "report.html"
    uri = tracking_uri(tracking_of(found.study).uri, found.study.folder)
    return "\n".join(
        [
            f"the page: {report}",
            "next:",
            f"  gpc-dist evaluate {adapter}",
            f"  gpc-dist inspect {adapter} --png prompt.png",
            f"  {ui_command(uri)}",
        ]
    )


def _shown(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
