"""The plot of `gpc-dist inspect`: the figures of one or several adapters, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gpc_dist.tracking.plots import COLOURS, INK, OTHERS, WIDTH, log_axis, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gpc_dist.training.inspect import LayerFigures

Figures = Sequence[tuple[str, Sequence["LayerFigures"]]]
"""Of each adapter, what it is called and the figures of its layers."""


def draw(found: Figures) -> Figure:
    """A line for each adapter; those after the first few are grey."""
    from matplotlib.lines import Line2D

    figure = new_figure(WIDTH, 6.4)
    cosine, size, gradient, cell = figure.subplots(2, 2).ravel()
    _lines(cosine, found, lambda each: each.cosine)
    cosine.set(ylabel="cosine of p_l with p_0", ylim=(min(0.0, cosine.get_ylim()[0]), 1.05))
    _lines(size, found, lambda each: each.prompt_rms)
    _lines(size, found, lambda each: each.text_rms, dashed=True)
    size.set(ylabel="root mean square", ylim=(0, None))
    _kinds(size, "prompt", "text")
    _lines(gradient, found, lambda each: each.gradient_norm)
    gradient.set_ylabel("norm of the gradient by p_l")
    log_axis(gradient, "y")
    _lines(cell, found, lambda each: each.written)
    _lines(cell, found, lambda each: each.gate, dashed=True)
    cell.set(ylabel="by the cell, before the layer", ylim=(0, None), xlim=cosine.get_xlim())
    _kinds(cell, "written", "gate")
    for axes in (cosine, size, gradient, cell):
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
    named = [
        Line2D([], [], color=_colour(place), marker="o", label=name) for place, (name, _) in enumerate(found)
    ]
    figure.legend(handles=named, loc="outside lower center", ncols=min(len(named), 4))
    return figure


def _lines(
    axes: Axes, found: Figures, value: Callable[[LayerFigures], float | None], dashed: bool = False
) -> None:
    for place, (_, figures) in enumerate(found):
        known = [(each.layer, number) for each in figures if (number := value(each)) is not None]
        if known:
            layers, numbers = zip(*known, strict=True)
            axes.plot(layers, numbers, "o--" if dashed else "o-", color=_colour(place), markersize=4)


def _kinds(axes: Axes, solid: str, dashed: str) -> None:
    """Say what solid and dashed lines are."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=INK, label=solid), Line2D([], [], color=INK, linestyle="--", label=dashed)]
    axes.legend(handles=lines)


def _colour(place: int) -> str:
    return COLOURS[place] if place < len(COLOURS) else OTHERS
