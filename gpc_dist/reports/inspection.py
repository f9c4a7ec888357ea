"""`gpc-dist inspect`: the figures of one or several adapters layer by layer, as tables, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from gpc_dist import files
from gpc_dist.adapter.store import read_card
from gpc_dist.config import AdapterConfig, Config
from gpc_dist.distributed.world import joined
from gpc_dist.errors import EXIT_DONE, UserError
from gpc_dist.inference.adapters import adapter_config, open_adapter
from gpc_dist.inference.engine import engine_of
from gpc_dist.inference.inspect import LayerFigures, inspect
from gpc_dist.reports.plots import COLOURS, INK, OTHERS, WIDTH, Plot, log_axis, new_figure, write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Figures = Sequence[tuple[str, Sequence[LayerFigures]]]
"""For each adapter its label and the figures of its layers."""


def run_inspection(
    folders: Sequence[Path],
    examples: int,
    json_file: Path | None,
    png: Path | None,
    overrides: Mapping[str, str],
) -> int:
    """Print the figures of each adapter's layers; returns the exit code. All adapters run on the engine of the first.

    Args:
        folders: of the adapters.
        examples: how many of the validation split to use, from the first on.
        json_file, png: files of the figures and of the plot.
        overrides: dotted keys of the configuration.

    Raises:
        UserError: no adapter in a folder, an adapter without a prompt, or an encoder that cannot be loaded.
    """
    engine = engine_of(folders[0], overrides)
    configs = {folder: adapter_config(read_card(folder), overrides, engine) for folder in folders}
    for folder, config in configs.items():
        if not config.adapter.has_prompt:
            raise UserError(
                f"{folder} has no prompt to inspect: its adapter.method is {config.adapter.method}"
            )
    found: dict[str, Sequence[LayerFigures]] = {}
    with joined(configs[folders[0]].engine) as world:
        for folder, config in configs.items():
            figures = inspect(open_adapter(folder, config, world), examples)
            if figures is None:
                continue
            found[str(folder)] = figures
            if len(folders) > 1:
                print(f"\n{folder}")
            print(_table(figures))
    if world.is_main:
        _write(configs, found, json_file, png)
    return EXIT_DONE


def _write(
    configs: Mapping[Path, Config],
    found: Mapping[str, Sequence[LayerFigures]],
    json_file: Path | None,
    png: Path | None,
) -> None:
    if json_file:
        layers = {name: [asdict(each) for each in figures] for name, figures in found.items()}
        files.write_json(json_file, {"adapters": layers})
    if png:
        labels = [_label(folder, config.adapter) for folder, config in configs.items()]
        lines = list(zip(labels, found.values(), strict=True))
        write_png(Plot("inspect", "Prompts by layer", "", lambda: draw(lines)), png)


def _table(figures: Sequence[LayerFigures]) -> str:
    columns = ["layer", "cosine with p_0", "prompt rms", "text rms", "gradient norm", "written", "gate"]
    return tabulate(
        [list(asdict(each).values()) for each in figures], columns, floatfmt=".4g", missingval="-"
    )


def _label(folder: Path, adapter: AdapterConfig) -> str:
    """Run and method of an adapter."""
    run = folder.absolute().parent.name if folder.name == "adapter" else folder.name
    return f"{run} ({adapter.cell} cell)" if adapter.method == "gpc" else f"{run} ({adapter.method})"


def draw(found: Figures) -> Figure:
    """A figure with a line for each adapter; lines after the first few are grey."""
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
    """Add a legend for solid and dashed lines."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=INK, label=solid), Line2D([], [], color=INK, linestyle="--", label=dashed)]
    axes.legend(handles=lines)


def _colour(place: int) -> str:
    return COLOURS[place] if place < len(COLOURS) else OTHERS
