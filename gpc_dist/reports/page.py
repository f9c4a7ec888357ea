"""A comparison as one HTML file that needs no network and no other file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpc_dist import files
from gpc_dist.errors import UserError
from gpc_dist.reports import html
from gpc_dist.reports.comparison import (
    Column,
    Comparison,
    Configuration,
    columns,
    counted,
    show,
    show_number,
    show_score,
    summary,
)
from gpc_dist.reports.comparison_plots import plots
from gpc_dist.reports.importance import importance
from gpc_dist.reports.plots import Plot, write_png


def write_comparison(
    comparisons: Sequence[Comparison], place: str, page: Path | None, png: Path | None
) -> list[Path]:
    """Write the page, the plots, or both; returns the files.

    Args:
        place: what was compared, for the title.
        page: HTML file to write; none when not given.
        png: folder of the plots, one file each, named after task, metric and plot; none when not given.

    Raises:
        UserError: a file cannot be written.
    """
    written, sections = [], []
    for comparison in comparisons:
        found = importance(comparison)
        drawn = plots(comparison, found)
        if png:
            for plot in drawn:
                file = png / f"{plot.name}.png"
                write_png(plot, file)
                written.append(file)
        if page:
            sections.append(_section(comparison, drawn, found if isinstance(found, str) else ""))
    if page:
        try:
            text = html.render("comparison.html", title=f"Comparison of {place}", sections=sections)
            files.write_text(page, text)
        except OSError as error:
            raise UserError(
                f"{page} cannot be written: {error.strerror}: give another file with --html"
            ) from None
        written.append(page)
    return written


def _section(comparison: Comparison, drawn: Sequence[Plot], no_importance: str) -> dict[str, Any]:
    """The values of a comparison that `comparison.html` shows."""
    shown = [*columns(comparison), Column("runs", _run_names, lambda c: c.runs[0].name)]
    numeric = [column.is_numeric(comparison.configurations) for column in shown]
    return {
        "task": comparison.task,
        "metric": comparison.metric,
        "summary": summary(comparison),
        "best": _best(comparison),
        "columns": [
            html.Column("#", numeric=True),
            *(html.Column(column.name, n) for column, n in zip(shown, numeric, strict=True)),
        ],
        "lines": [
            [html.Cell(str(number), number), *(_cell(column, each, comparison.metric) for column in shown)]
            for number, each in enumerate(comparison.configurations, start=1)
        ],
        "plots": drawn,
        "no_importance": no_importance,
    }


def _cell(column: Column, configuration: Configuration, metric: str) -> html.Cell:
    detail = _run_details(configuration, metric) if column.name in ("runs", "state") else ""
    return html.Cell(column.text(configuration), column.order(configuration), detail)


def _best(comparison: Comparison) -> dict[str, Any] | None:
    """The best configuration: its score, its settings and one of its runs; None if none has a value."""
    if not comparison.ranked:
        return None
    best, *others = comparison.ranked
    baseline, ahead = best.baseline(comparison.metric), ""
    if others and best.mean is not None and others[0].mean is not None:
        ahead = f"{abs(best.mean - others[0].mean):.4f}"
    return {
        "score": show_score(best),
        "seeds": "one seed, so the spread is not known" if best.std is None else f"{len(best.values)} seeds",
        "baseline": "" if baseline is None else f"{baseline:.4f}",
        "ahead": ahead,
        "settings": {key: _exact(best.settings.get(key)) for key in comparison.varied},
        "run": next(run for run in best.runs if comparison.metric in run.best),
    }


def _exact(value: Any) -> str:
    return repr(value) if isinstance(value, float) else show(value)


def _run_names(configuration: Configuration) -> str:
    first, *others = (run.name for run in configuration.runs)
    return f"{first} and {counted(len(others), 'other')}" if others else first


def _run_details(configuration: Configuration, metric: str) -> str:
    """One line for each run, for a tooltip."""
    return "\n".join(
        f"{run.name}: seed {run.seed}, {show_number(run.best.get(metric), '.4f')}, {run.state}"
        + (f", {run.reason}" if run.reason else "")
        for run in configuration.runs
    )
