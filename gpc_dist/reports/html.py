"""HTML pages that need no other file, from the templates beside this module; all text in them is escaped."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gpc_dist.reports.comparison import shorten
from gpc_dist.reports.plots import Plot, to_svg
from gpc_dist.typed import is_number


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str
    numeric: bool
    """Numbers are aligned on the right."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    order: float | str | None = None
    """Sort key of its line; None without a value."""
    detail: str = ""
    """Tooltip."""

    @property
    def short(self) -> str:
        return shorten(self.text)

    @property
    def hover(self) -> str:
        return self.detail or (self.text if self.short != self.text else "")

    @property
    def sort_key(self) -> Markup:
        """The attribute that `sort.js` reads: `data-n` for a number, `data-s` for a text."""
        if self.order is None:
            return Markup("")
        return Markup(' data-{}="{}"').format("n" if is_number(self.order) else "s", self.order)


def render(template: str, **values: Any) -> str:
    """A page from a template of the folder `templates`."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("gpc_dist.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["zip"] = zip
    environment.filters["svg"] = lambda plot: Markup(to_svg(plot))
    environment.tests["plot"] = lambda block: isinstance(block, Plot)
    return environment
