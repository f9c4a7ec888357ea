"""Pictures of a run for MLflow. matplotlib is imported on use."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFUSION = "confusion_matrix.png"

_WITH_NUMBERS, _WITH_NAMES = 30, 100
"""Most classes of which each cell has its number, and each row its label: those of more could not be read."""
_NAME_LENGTH = 30


@contextmanager
def style() -> Iterator[None]:
    """In which figures are made and written."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # letters that the font lacks are drawn as boxes
        yield


def confusion(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> Figure:
    """A confusion matrix: numbers of examples by label (row) and prediction (column), coloured by the share in the row.

    Args:
        counts: `[C, C]`, in the order of `labels`.
    """
    import numpy as np
    from matplotlib.figure import Figure

    table = np.array(counts)
    shares = table / table.sum(axis=1, keepdims=True).clip(1)
    size = min(3.0 + 0.4 * len(labels), 24.0)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    names = [label if len(label) <= _NAME_LENGTH else f"{label[: _NAME_LENGTH - 1]}…" for label in labels]
    if len(names) > _WITH_NAMES:
        names = []
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    if len(labels) <= _WITH_NUMBERS:
        for (row, column), count in np.ndenumerate(table):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour)
    return figure
