"""The description of a packaged task, as the module of its benchmark gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from gpc_dist.errors import UserError
from gpc_dist.tasks.example import Example, Kind
from gpc_dist.tasks.formats import Row
from gpc_dist.tasks.metrics import Metric
from gpc_dist.tasks.values import in_column, label_of


@dataclass(frozen=True)
class Spec:
    """A packaged task; `packaged.make_packaged_task` makes a `Task` of it."""

    adapt: Callable[[Row], Iterator[Example]]
    """The examples of a source row."""
    columns: tuple[str, ...]
    """Columns of a flat row that a prediction needs; the nested rows of the files hold the same."""
    kind: Kind
    labels: tuple[str, ...]
    """In the order of the Hub's indices."""
    label_words: tuple[str, ...]
    metrics: Mapping[str, Metric]
    answered_by: str | None = None
    """Of a diagnostic, which has no training rows: the task whose adapters answer it."""
    file: str | None = None
    """Name of its one file."""


def class_index(row: Row, labels: tuple[str, ...]) -> int | None:
    """The class of a row whose label is a name, a boolean or the Hub's index; None if the label is withheld.

    Raises:
        UserError: the label is none of `labels`, or no label at all.
    """
    label = in_column("label", label_of, row.get("label")).lower()
    if label in ("", "-1"):
        return None
    if label in labels:
        return labels.index(label)
    if label.isdecimal() and int(label) < len(labels):
        return int(label)
    raise UserError(f"label '{label}' is none of {', '.join(labels)}")
