"""The plots of a study's report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpc_dist.reports.plots import COLOURS, INK, OTHERS, WIDTH, Plot, new_figure, over_seeds
from gpc_dist.study.results import FinalRun, StudyResult, TaskResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_ACROSS = 4
"""Most panels in a row."""


def plots(found: StudyResult) -> list[Plot]:
    """The plots for which the study has enough data."""
    study = found.study
    made = [
        Plot(
            "scores",
            "Scores",
            "On the official validation split: the mean over seeds, one standard deviation as a bar, each seed as a "
            "small point. The dotted line, where it is near enough, is the majority baseline.",
            lambda: _scores(found),
        )
    ]
    if any(task.differences for task in found.tasks):
        made.append(
            Plot(
                "differences",
                f"Difference from {study.reference}",
                "Mean over seeds, minus that of the reference; the bar is the 95 % bootstrap interval over examples. "
                "Where it crosses the line, the split is too small to tell the two apart.",
                lambda: _differences(found),
            )
        )
    if found.searched:
        made.append(
            Plot(
                "spread",
                "How the search went",
                "Each point is a run of the search, by its best evaluation on the hold-out; beside them how many "
                "failed. The dotted line, where it is near enough, is the majority baseline of the official split.",
                lambda: _spread(found),
            )
        )
    return [
        *made,
        Plot(
            "curves",
            "Learning curves",
            f"Of the final runs, on the hold-out: mean and one standard deviation over seeds. Black: {study.floor} "
            f"(dotted) and {study.ceiling}. Grey: the methods after the first {len(COLOURS)}.",
            lambda: _curves(found),
        ),
    ]


def _panels(count: int, width: float, height: float, share_y: bool) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels of `width` x `height` inches, in rows of at most `_MOST_ACROSS`."""
    across = min(count, _MOST_ACROSS)
    down = -(-count // across)
    figure = new_figure(max(WIDTH, width * across), height * down)
    axes = figure.subplots(down, across, squeeze=False, sharey="row" if share_y else False).ravel().tolist()
    for empty in axes[count:]:
        empty.set_visible(False)
    return figure, axes[:count]


def _by_method(found: StudyResult) -> tuple[Figure, list[Axes], list[str]]:
    """A panel for each task with a line for each method, the first one on top."""
    names = list(found.study.methods)
    figure, axes = _panels(len(found.tasks), 2.6, 1.1 + 0.3 * len(names), share_y=True)
    for place, one in enumerate(axes):
        one.set_ylim(len(names) - 0.5, -0.5)
        if place % _MOST_ACROSS == 0:
            one.set_yticks(range(len(names)), names)
    return figure, axes, names


def _scores(found: StudyResult) -> Figure:
    figure, panels, names = _by_method(found)
    for axes, task in zip(panels, found.tasks, strict=True):
        for line, name in enumerate(names):
            if name in task.methods and task.methods[name].mean is not None:
                result = task.methods[name]
                scores = [run.score for run in result.runs]
                axes.plot(scores, [line] * len(scores), ".", color=OTHERS, markersize=4)
                axes.errorbar(result.mean, line, xerr=result.std or 0.0, fmt="o", color=COLOURS[0], capsize=2)  # type: ignore[arg-type]
        _majority(axes, task)
        axes.set(xlabel=task.metric)
    return figure


def _majority(axes: Axes, task: TaskResult) -> None:
    """Put the majority baseline into the title, and draw it unless the axis would have to grow much for it."""
    low, high = axes.get_xlim()
    if low - (high - low) <= task.majority <= high + (high - low):
        axes.axvline(task.majority, color=INK, linewidth=1, dashes=(2, 3))
    axes.set_title(f"{task.name} (majority {task.majority:.3f})")


def _differences(found: StudyResult) -> Figure:
    figure, panels, names = _by_method(found)
    for axes, task in zip(panels, found.tasks, strict=True):
        for name, difference in task.differences.items():
            low, high = difference.interval
            axes.plot([low, high], [names.index(name)] * 2, color=COLOURS[0], linewidth=2, alpha=0.6)
            axes.plot(difference.mean, names.index(name), "o", color=COLOURS[0])
        axes.axvline(0, color=INK, linewidth=1)
        axes.set(title=task.name, xlabel=f"difference in {task.metric}")
    return figure


def _spread(found: StudyResult) -> Figure:
    figure, panels, names = _by_method(found)
    for axes, task in zip(panels, found.tasks, strict=True):
        for line, name in enumerate(names):
            if name in task.methods:
                search = task.methods[name].search
                axes.plot(search.values, [line] * len(search.values), "o", color=COLOURS[0], alpha=0.4)
                if search.failed:
                    where = axes.get_yaxis_transform()
                    axes.text(0.01, line - 0.25, f"{search.failed} failed", transform=where, fontsize="small")
        _majority(axes, task)
        axes.set(xlabel=f"hold-out {task.metric}")
    return figure


def _curves(found: StudyResult) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, panels = _panels(len(found.tasks), 3.2, 3.2, share_y=False)
    ends = [found.study.floor, found.study.ceiling]
    between = [name for name in found.study.methods if name not in ends]
    colours = dict(zip(between, COLOURS, strict=False)) | dict.fromkeys(ends, INK)
    named = {}
    for axes, task in zip(panels, found.tasks, strict=True):
        for name in found.study.methods:
            runs = task.methods[name].runs if name in task.methods else []
            steps, mean, std = over_seeds(_evaluations(runs, task.metric))
            if not steps:
                continue
            if name not in colours:
                axes.plot(steps, mean, color=OTHERS, linewidth=0.7, zorder=1)
                continue
            dotted = ":" if name == found.study.floor else "-"
            (named[name],) = axes.plot(steps, mean, color=colours[name], linestyle=dotted, linewidth=1.5)
            axes.fill_between(steps, mean - std, mean + std, color=colours[name], alpha=0.15, linewidth=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set(title=task.name, xlabel="step", ylabel=f"hold-out {task.metric}")
    if named:
        columns = min(len(named), 8)
        figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=columns)
    return figure


def _evaluations(runs: Sequence[FinalRun], metric: str) -> list[list[tuple[int, float]]]:
    return [run.record.curves.get(f"val/{metric}", []) for run in runs]
