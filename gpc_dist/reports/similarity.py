"""`gpc-dist similarity`: cosines of adapters as a table, as JSON and as heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from gpc_dist import config as configuration
from gpc_dist import files
from gpc_dist.adapter.fingerprint import EncoderIdentity
from gpc_dist.adapter.store import read_card
from gpc_dist.config import Config
from gpc_dist.distributed.world import joined
from gpc_dist.errors import EXIT_DONE, UserError
from gpc_dist.inference.engine import engine_of
from gpc_dist.inference.similarity import Matrix, Similarity, compare
from gpc_dist.reports.comparison import shorten
from gpc_dist.reports.plots import COLOURS, INK, PAPER, WIDTH, Plot, new_figure, write_png
from gpc_dist.shown import shown
from gpc_dist.tasks import make_task
from gpc_dist.training.saved_adapter import load_on_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

FILES = ("similarity.json", "similarity.png")
_MEASURES = {"mean_tokens": "mean token", "tokens": "pairs of tokens", "effects": "effect on texts"}
"""Fields of `Similarity`, and what they are called."""
_MOST_NUMBERS = 10
"""Adapters in a heat map whose cells have room for their numbers."""


def run_similarity(
    folders: Sequence[Path], probe: Path | None, output: Path | None, overrides: Mapping[str, str]
) -> int:
    """Print how alike each two adapters are; returns the exit code. All run on the engine of the first.

    Args:
        folders: of the adapters.
        probe: a file of texts; the packaged demo's validation split when not given.
        output: folder for the figures as JSON and as heat maps.
        overrides: dotted keys of the configuration; `task.text` names the column of the texts.

    Raises:
        UserError: fewer than two adapters; one without a prompt, or of another encoder than the first; or an encoder
            or texts that cannot be read.
    """
    if len(folders) < 2:
        raise UserError("give at least two adapters: how alike they are is a matter of two")
    cards = {folder: read_card(folder) for folder in folders}
    first = cards[folders[0]].encoder
    for folder, card in cards.items():
        if not card.adapter.has_prompt:
            raise UserError(f"{folder} has no prompt to compare: its adapter.method is {card.adapter.method}")
        if card.encoder.sha256 != first.sha256:
            raise UserError(
                f"{folder} was trained on encoder '{card.encoder.path}' (sha256 {card.encoder.sha256[:12]}), and "
                f"{folders[0]} on '{first.path}' (sha256 {first.sha256[:12]}): give adapters of one encoder"
            )
    config = _probe_config(first, probe, engine_of(folders[0], overrides), overrides)
    with joined(config.engine) as world:
        saved = [load_on_all(folder, world) for folder in folders]
        texts = make_task(config.task, config.data).read("test")
        found = compare(saved, config, texts, world)
    if found is None:
        return EXIT_DONE
    names = names_of(folders)
    print(_table(names, found))
    if output is not None:
        figures = {"adapters": [str(folder) for folder in folders], "names": names, "texts": len(texts)}
        files.write_json(output / FILES[0], figures | asdict(found))
        write_png(Plot("similarity", "Adapters alike", "", lambda: draw(names, found)), output / FILES[1])
        print(f"figures: {' and '.join(str(output / name) for name in FILES)}")
    return EXIT_DONE


def _probe_config(
    encoder: EncoderIdentity, probe: Path | None, engine: Mapping[str, Any], overrides: Mapping[str, str]
) -> Config:
    """The configuration that reads texts for an encoder: a table whose test split they are."""
    # an absolute path, because `demo` and Hub ids have meanings of their own
    path, name = ("demo", "validation.jsonl") if probe is None else (str(probe.absolute().parent), probe.name)
    tree = {
        "encoder": {"path": encoder.path, "revision": encoder.revision},
        "task": {"name": "texts", "kind": "regression", "text": ["text"]},
        "engine": engine,
    }
    return configuration.build(tree, {**overrides, "data.path": path, "data.test": name})


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each adapter: the end of its path that tells it from the others, without a last `adapter`."""
    paths = [folder.absolute() for folder in folders]
    paths = [path.parent if path.name == "adapter" else path for path in paths]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return [shown(name) for name in names]


def _table(names: Sequence[str], found: Similarity) -> str:
    """A line for each two adapters, those with the most similar effects first."""
    pairs = sorted(
        combinations(range(len(names)), 2),
        key=lambda pair: found.effects[pair[0]][pair[1]] or 0.0,
        reverse=True,
    )
    lines = [
        [
            shorten(names[one]),
            shorten(names[other]),
            *(getattr(found, measure)[one][other] for measure in _MEASURES),
        ]
        for one, other in pairs
    ]
    return tabulate(lines, ["adapter", "adapter", *_MEASURES.values()], floatfmt=".3f", missingval="-")


def draw(names: Sequence[str], found: Similarity) -> Figure:
    """A heat map of each measure, one scale for all; pairs that cannot be compared are left white."""
    size = max(2.4, 0.42 * len(names))
    figure = new_figure(max(WIDTH, 3 * size + 3.5), size + 2.2)
    places = figure.subplots(1, len(_MEASURES), sharey=True)
    shorter = [shorten(name) for name in names]
    for axes, (measure, title) in zip(places, _MEASURES.items(), strict=True):
        image = _heat_map(axes, getattr(found, measure), len(names) <= _MOST_NUMBERS)
        axes.set_title(f"cosine: {title}", fontsize="medium")
        axes.set_xticks(range(len(names)), shorter, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), shorter)
    figure.colorbar(image, ax=list(places), shrink=0.8, pad=0.02)
    return figure


def _heat_map(axes: Axes, cosines: Matrix, numbers: bool) -> AxesImage:
    """Draw a matrix on a scale from -1 to 1; with its numbers if they have room."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    values = np.array(cosines, dtype=float)  # None becomes NaN, which is not drawn
    scale = LinearSegmentedColormap.from_list("cosine", (COLOURS[0], PAPER, COLOURS[1]))
    axes.grid(False)
    image = axes.imshow(values, cmap=scale, vmin=-1, vmax=1)
    if numbers:
        for (row, column), value in np.ndenumerate(values):
            said = "" if np.isnan(value) else f"{value:.2f}"
            axes.text(column, row, said, ha="center", va="center", fontsize="x-small", color=INK)
    return image
