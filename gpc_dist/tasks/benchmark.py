"""What a benchmark's module says of each of its tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from gpc_dist.errors import UserError
from gpc_dist.tasks.example import Example, Kind
from gpc_dist.tasks.metrics import Metric
from gpc_dist.tasks.read import Row


@dataclass(frozen=True)
class Spec:
    """A packaged task; `packaged.make_packaged_task` makes a `Task` of it."""

    adapt: Callable[[Row], Iterator[Example]]
    """The examples of a source row."""
    columns: tuple[str, ...]
    """What a flat row needs for a prediction; the files' nested rows hold the same."""
    kind: Kind
    labels: tuple[str, ...]
    """In the order of the Hub's indices."""
    label_words: tuple[str, ...]
    metrics: Mapping[str, Metric]


def class_index(row: Row, labels: tuple[str, ...]) -> int | None:
    """The label as an index: given as a name, a boolean or the Hub's index; None when withheld.

    Raises:
        UserError: it is none of `labels`.
    """
    label = row.get("label")
    if isinstance(label, str) and label.isdecimal():
        label = int(label)  # from a TSV file
    if label is None or label == -1:
        return None
    if isinstance(label, str) and label.lower() in labels:
        return labels.index(label.lower())
    if isinstance(label, int) and 0 <= label < len(labels):
        return int(label)
    raise UserError(f"label {label!r} is none of {', '.join(labels)}")
