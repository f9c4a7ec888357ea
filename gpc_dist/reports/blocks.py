"""What a report is made of: headings, paragraphs, tables and plots, written as Markdown and as HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tabulate import tabulate

from gpc_dist.reports.page import cell, figure, head, page
from gpc_dist.reports.plots import Plot

_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+")


@dataclass(frozen=True)
class Table:
    """A title, what to know when reading it, and the cells; the first column names the line."""

    title: str
    note: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]


Block = str | Table | Plot
"""A string is a paragraph."""


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """A document; plots are files beside it."""
    parts = [f"# {title}"]
    for block in blocks:
        if isinstance(block, str):
            parts.append(block)
        elif isinstance(block, Plot):
            parts.append(f"## {block.title}\n\n![{block.title}]({block.name}.png)\n\n{block.caption}")
        else:
            align = ["right" if numeric else "left" for numeric in _numeric(block)]
            lines = [[text.replace("|", "\\|") for text in line] for line in block.lines]
            table = tabulate(lines, block.columns, tablefmt="pipe", disable_numparse=True, colalign=align)
            parts.append(f"## {block.title}\n\n{table}\n\n{block.note}")
    return "\n\n".join(parts) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """A page that needs no other file."""
    return page(title, [f"<section>\n{_html(block)}\n</section>" for block in blocks])


def _html(block: Block) -> str:
    if isinstance(block, str):
        return f"<p>{escape(block)}</p>"
    if isinstance(block, Plot):
        return figure(block)
    numeric = _numeric(block)
    heads = "".join(head(name, aligned) for name, aligned in zip(block.columns, numeric, strict=True))
    lines = "\n".join(
        "<tr>" + "".join(cell(text, _order(text), n) for text, n in zip(line, numeric, strict=True)) + "</tr>"
        for line in block.lines
    )
    return (
        f'<h3>{escape(block.title)}</h3>\n<div class="table"><table>\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody></table></div>\n<p>{escape(block.note)}</p>"
    )


def _numeric(table: Table) -> list[bool]:
    """Of each column, whether a number stands in it."""
    columns = zip(*table.lines, strict=True)
    return [any(_NUMBER.match(text) for text in column) for column in columns]


def _order(text: str) -> float | str:
    """What a cell is sorted by: the number it begins with, or else the text."""
    found = _NUMBER.match(text)
    return float(found[0].replace(",", "")) if found else text
