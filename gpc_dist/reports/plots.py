"""Plots of reports, in one style: as SVG in the text colour of their page, and as PNG."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpc_dist.errors import UserError
from gpc_dist.runs.records import Curve

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart; visible on white and on black
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
OTHERS = "#8c8c8c"
# placeholders for the colours of text and background, which a page replaces by its own; no data have them
INK = "#1b1c1d"
PAPER = "#fdfefd"

WIDTH = 10.5
"""Inches of a figure."""
_DPI = 150
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Plot:
    """A figure to be drawn, with its title and caption."""

    name: str
    """Of its file, and of its element in a page; unique in a page."""
    title: str
    caption: str
    draw: Callable[[], Figure]


def to_svg(plot: Plot) -> str:
    """An `<svg>` element for a page: transparent, its text, axes and grid in the colour of the page's text."""
    buffer = io.StringIO()
    with _style(plot.name):
        plot.draw().savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    # ids of groups would be the same in every figure of a page; ids that are referred to have no underscore
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    return re.sub(r"<svg[^>]*>", _svg_start, svg, count=1)


def _svg_start(found: re.Match[str]) -> str:
    """The first tag, with bounds on the width to which a page scales the figure, so that its text stays legible."""
    (box,) = re.findall(r'viewBox="([^"]*)"', found[0])
    width_pt = float(box.split()[2])
    style = f"min-width: {0.8 * width_pt:.0f}pt; max-width: {1.2 * width_pt:.0f}pt"
    return f'<svg role="img" viewBox="{box}" style="{style}">'


def write_png(plot: Plot, file: Path) -> None:
    """Write the plot as a PNG file; creates its folder.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _style(plot.name):
            plot.draw().savefig(file, format="png", dpi=_DPI)
    except OSError as error:
        raise UserError(
            f"{file} cannot be written: {error.strerror}: give another folder with --png"
        ) from None


@contextmanager
def _style(salt: str) -> Iterator[None]:
    import matplotlib

    style: dict[Any, Any] = {
        "font.size": 10,
        "font.family": "sans-serif",
        "text.parse_math": False,  # a $ in a setting does not start a formula
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": INK,
        "grid.alpha": 0.15,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,  # ids that are the same for the same runs
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # letters that the font lacks are drawn as boxes
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def log_axis(axes: Axes, which: str) -> None:
    """Make the axis `which`, x or y, logarithmic with plain numbers at the ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def over_seeds(curves: Sequence[Curve]) -> tuple[list[int], np.ndarray, np.ndarray]:
    """All steps in order, and at each the mean and standard deviation of the curves that have it, float64 `[steps]`."""
    import numpy as np

    at: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            at.setdefault(step, []).append(value)
    steps = sorted(at)
    mean = np.array([np.mean(at[step]) for step in steps])
    std = np.array([np.std(at[step], ddof=1) if len(at[step]) > 1 else 0.0 for step in steps])
    return steps, mean, std
