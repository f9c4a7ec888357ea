"""A comparison as one HTML file that needs nothing else: no network, no other file, little JavaScript."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from gpc_dist import files
from gpc_dist.errors import UserError
from gpc_dist.reports.comparison import (
    Column,
    Comparison,
    Configuration,
    columns,
    counted,
    is_number,
    shorten,
    show,
    show_number,
    show_score,
    summary,
)
from gpc_dist.reports.importance import importance
from gpc_dist.reports.plots import Plot, plots, to_svg, write_png


def write_comparison(
    comparisons: Sequence[Comparison], place: str, html: Path | None, png: Path | None
) -> list[Path]:
    """Write the page and the plots that are wanted; returns the files.

    Args:
        place: what was compared, for the title.
        html: file of the page.
        png: folder of the plots, one file each, named after task, metric and plot.

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
        if html:
            sections.append(_section(comparison, drawn, found if isinstance(found, str) else ""))
    if html:
        try:
            files.write_text(html, page(f"Comparison of {place}", sections))
        except OSError as error:
            raise UserError(
                f"{html} cannot be written: {error.strerror}: give another file with --html"
            ) from None
        written.append(html)
    return written


def page(title: str, sections: Sequence[str]) -> str:
    """A whole page of these sections of HTML."""
    title = escape(title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        + "\n".join(sections)
        + f"\n<script>{_SORT}</script>\n</body>\n</html>\n"
    )


def _section(comparison: Comparison, drawn: Sequence[Plot], no_importance: str) -> str:
    parts = [
        f"<h2>{escape(comparison.task)}: {escape(comparison.metric)}</h2>",
        f"<p>{escape(summary(comparison))}. The score of a run is that of its best evaluation, on the data that also "
        "chose its checkpoint; ± is the standard deviation over seeds.</p>",
        _best(comparison),
        _table(comparison),
        *(figure(plot) for plot in drawn),
    ]
    if no_importance:
        parts.append(f"<h3>Importance of the settings</h3>\n<p>{escape(no_importance)}</p>")
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def figure(plot: Plot) -> str:
    """A plot with its title and its caption."""
    return (
        f'<figure id="{plot.name}">\n<h3>{escape(plot.title)}</h3>\n<div class="plot">{to_svg(plot)}</div>\n'
        f"<figcaption>{escape(plot.caption)}</figcaption>\n</figure>"
    )


def _best(comparison: Comparison) -> str:
    """The first configuration: its score, its settings, and how to make it once more."""
    if not comparison.ranked:
        return f"<p>No run has been evaluated by {escape(comparison.metric)} yet.</p>"
    best = comparison.ranked[0]
    seeds = "one seed, so the spread is not known" if best.std is None else f"{len(best.values)} seeds"
    said = f"<strong>{show_score(best)}</strong> {escape(comparison.metric)} ({seeds})"
    if (baseline := best.baseline(comparison.metric)) is not None:
        said += f"; majority baseline {baseline:.4f}"
    if len(comparison.ranked) > 1 and best.mean is not None and comparison.ranked[1].mean is not None:
        said += f"; {abs(best.mean - comparison.ranked[1].mean):.4f} ahead of the second"
    settings = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(_exact(best.settings.get(key)))}</dd>"
        for key in comparison.varied
    )
    run = next(run for run in best.runs if comparison.metric in run.best)
    again = "\n".join(run.again)
    given = f"<p>It was made by:</p>\n<pre>{escape(run.command)}</pre>" if run.command else ""
    return (
        f'<div class="best">\n<h3>Best configuration</h3>\n<p>{said}</p>\n'
        + (f"<dl>{settings}</dl>\n" if settings else "")
        + f"<p>To make run {escape(run.name)} (seed {run.seed}) once more:</p>\n<pre>{escape(again)}</pre>\n"
        + f"{given}\n</div>"
    )


def _exact(value: Any) -> str:
    return repr(value) if isinstance(value, float) else show(value)


def _table(comparison: Comparison) -> str:
    shown = [*columns(comparison), Column("runs", _run_names, lambda c: c.runs[0].name)]
    numeric = [column.is_numeric(comparison.configurations) for column in shown]
    heads = head("#", True) + "".join(
        head(column.name, aligned) for column, aligned in zip(shown, numeric, strict=True)
    )
    lines = []
    for number, configuration in enumerate(comparison.configurations, start=1):
        cells = [cell(str(number), number, True)]
        for column, aligned in zip(shown, numeric, strict=True):
            detail = (
                _run_details(configuration, comparison.metric) if column.name in ("runs", "state") else ""
            )
            cells.append(cell(column.text(configuration), column.order(configuration), aligned, detail))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="table"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def head(name: str, numeric: bool) -> str:
    """The head of a column, which sorts the table by it."""
    kind = ' class="n"' if numeric else ""
    return f'<th aria-sort="none"{kind}><button type="button">{escape(name)}</button></th>'


def cell(text: str, order: Any, numeric: bool, detail: str = "") -> str:
    """A cell that says what to sort by: `data-n`, a number, or `data-s`, a text, or neither."""
    short = shorten(text)
    kind = ' class="n"' if numeric else ""
    key = "" if order is None else f' data-{"n" if is_number(order) else "s"}="{escape(str(order))}"'
    title = detail or (text if short != text else "")
    hover = f' title="{escape(title)}"' if title else ""
    return f"<td{kind}{key}{hover}>{escape(short)}</td>"


def _run_names(configuration: Configuration) -> str:
    first, *others = (run.name for run in configuration.runs)
    return f"{first} and {counted(len(others), 'other')}" if others else first


def _run_details(configuration: Configuration, metric: str) -> str:
    """One line for each run, for those who point at the cell."""
    return "\n".join(
        f"{run.name}: seed {run.seed}, {show_number(run.best.get(metric), '.4f')}, {run.state}"
        + (f", {run.reason}" if run.reason else "")
        for run in configuration.runs
    )


_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2126; --quiet: #5b6470; --line: #d9dde2;
  --box: #f4f6f8; --mark: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e4e7eb; --quiet: #9aa4b0; --line: #343a42; --box: #1d2126; --mark: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 84rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 0 0 .5rem; }
.best { background: var(--box); border-left: 4px solid var(--mark); padding: 1rem 1.25rem; margin: 1rem 0; }
.best p { margin: .4rem 0; }
.best strong { font-size: 1.2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .6rem 0; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { margin: .3rem 0; padding: .6rem .8rem; background: var(--paper); border: 1px solid var(--line);
  font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.table { overflow: auto; max-height: 34rem; border: 1px solid var(--line); }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: var(--box); padding: 0; text-align: left; }
th button { all: unset; cursor: pointer; padding: .4rem .55rem; width: 100%; box-sizing: border-box;
  white-space: nowrap; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--mark); outline-offset: -2px; }
th.n button, td.n { text-align: right; }
th[aria-sort=ascending] button::after { content: " \\25b2"; }
th[aria-sort=descending] button::after { content: " \\25bc"; }
td { padding: .3rem .55rem; border-top: 1px solid var(--line); white-space: nowrap; }
tbody tr:hover { background: var(--box); }
figure { margin: 2rem 0; }
figcaption { color: var(--quiet); font-size: .88rem; max-width: 60rem; }
.plot { overflow-x: auto; }
.plot svg { display: block; margin: auto; width: 100%; height: auto; }
"""

# numbers before texts, what has no value always last
_SORT = """
document.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => {
  const head = button.parentElement, row = head.parentElement, body = row.closest("table").tBodies[0];
  const place = head.cellIndex, down = head.ariaSort === "ascending";
  const key = line => {
    const { n, s } = line.cells[place].dataset;
    return n !== undefined ? [0, Number(n)] : s !== undefined ? [1, s] : [2, 0];
  };
  const sign = down ? -1 : 1;
  const compare = (a, b) => typeof a === "string" ? a.localeCompare(b) : a - b;
  const lines = [...body.rows].map(line => [key(line), line]);
  lines.sort(([[i, a]], [[j, b]]) => i === 2 || j === 2 ? i - j : sign * (i - j || compare(a, b)));
  body.append(...lines.map(([, line]) => line));
  for (const other of row.cells) other.ariaSort = "none";
  head.ariaSort = down ? "descending" : "ascending";
}));
"""
