"""The blocks of a report (paragraphs, tables and plots), written as Markdown and as HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

from gpc_dist.reports import html
from gpc_dist.reports.plots import Plot

_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+")


@dataclass(frozen=True)
class Table:
    """A title, a note for the reader, and the cells; the first column names the line."""

    title: str
    note: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether it has numbers."""
        columns = zip(*self.lines, strict=True)
        return [any(_NUMBER.match(text) for text in column) for column in columns]

    @property
    def html_columns(self) -> list[html.Column]:
        return [html.Column(name, numeric) for name, numeric in zip(self.columns, self.numeric, strict=True)]

    @property
    def html_lines(self) -> list[list[html.Cell]]:
        return [[html.Cell(text, _order(text)) for text in line] for line in self.lines]


Block = str | Table | Plot
"""A string is a paragraph."""


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """A Markdown document; its plots are files beside it."""
    parts = [f"# {title}"]
    for block in blocks:
        if isinstance(block, str):
            parts.append(block)
        elif isinstance(block, Plot):
            parts.append(f"## {block.title}\n\n![{block.title}]({block.name}.png)\n\n{block.caption}")
        else:
            align = ["right" if numeric else "left" for numeric in block.numeric]
            lines = [[text.replace("|", "\\|") for text in line] for line in block.lines]
            table = tabulate(lines, block.columns, tablefmt="pipe", disable_numparse=True, colalign=align)
            parts.append(f"## {block.title}\n\n{table}\n\n{block.note}")
    return "\n\n".join(parts) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """An HTML page that needs no other file."""
    return html.render("blocks.html", title=title, blocks=blocks)


def _order(text: str) -> float | str:
    """Sort key of a cell: the number it begins with, or else its text."""
    found = _NUMBER.match(text)
    return float(found[0].replace(",", "")) if found else text
