"""Packaged tasks: those of SuperGLUE and of GLUE, and SuperGLUE's diagnostics, by name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

from gpc_dist.config import DataConfig
from gpc_dist.errors import UserError
from gpc_dist.tasks import diagnostics, glue, superglue
from gpc_dist.tasks.example import Example, Split
from gpc_dist.tasks.formats import Row
from gpc_dist.tasks.read import Source, read_rows, the_input
from gpc_dist.tasks.task import Task
from gpc_dist.tasks.values import is_null

_SPECS = superglue.SPECS | glue.SPECS | diagnostics.SPECS

NAMES = tuple(_SPECS)


def make_packaged_task(name: str, data: DataConfig, metric: str | None = None) -> Task:
    """The packaged task `name`; `metric` overrides the one that selects the best checkpoint."""
    spec = _SPECS[name]
    averaged = len(spec.metrics) > 1 and not spec.answered_by
    return Task(
        name=name,
        kind=spec.kind,
        labels=spec.labels,
        label_words=spec.label_words,
        metrics=spec.metrics,
        main_metric=metric or ("average" if averaged else next(iter(spec.metrics))),
        columns=spec.columns,
        reader=partial(_read, name, data),
        parser=partial(_parse, name),
        averaged=averaged,
    )


def answered_by(name: str) -> str | None:
    """The task whose adapters answer a diagnostic; None for any other task."""
    return _SPECS[name].answered_by if name in _SPECS else None


def _read(name: str, data: DataConfig, split: Split) -> list[Example]:
    spec = _SPECS[name]
    if spec.answered_by and split == "train":
        raise UserError(
            f"task {name} is a diagnostic and has no training rows: train {spec.answered_by}, and evaluate its adapter "
            f"with --task.name {name}"
        )
    source, rows = read_rows(data, split, hub_config=name, only=spec.file)
    return adapt_rows(name, _without_labels(rows) if split == "test" else rows, source)


def _parse(name: str, rows: list[Row]) -> list[Example]:
    return adapt_rows(name, _without_labels(rows), the_input(rows))


def _without_labels(value: Any) -> Any:
    """Rows without their labels, also those of nested answers."""
    if isinstance(value, list):
        return [_without_labels(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_labels(item) for key, item in value.items() if key != "label"}
    return value


def adapt_rows(name: str, rows: list[Row], source: Source) -> list[Example]:
    """The examples of a packaged task's source rows.

    Raises:
        UserError: a row does not have the task's columns, or has nothing in one of them; the message gives its number
            in `source`.
    """
    adapt = _SPECS[name].adapt
    examples: list[Example] = []
    for number, row in enumerate(rows):
        with source.at(number):
            try:
                _check_texts(name, row)
                made = list(adapt({"idx": number} | row))
                _check_types(made)
            except _NOT_SUCH_A_ROW as error:
                raise UserError(
                    f"this is not a row of task {name} ({error!r}); it has: {', '.join(row)}"
                ) from None
            examples += made
    return examples


_NOT_SUCH_A_ROW = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError)
"""What comes of values of other types where a row is taken apart."""


def _check_types(examples: Sequence[Example]) -> None:
    """Raise TypeError for examples of other values than those of the task's files."""
    for example in examples:
        for text in chain.from_iterable(example.rows):
            if not isinstance(text, str | None):
                raise TypeError(f"{text!r} is no text")
        hash((example.group, example.source))


_NESTED = ("passage", "qas", "target")
"""Where the rows of the official files have their texts."""


def _check_texts(name: str, row: Row) -> None:
    for column in (*_SPECS[name].columns, *_NESTED):
        if column in row and (place := _null_in(row[column], column)):
            raise UserError(f"column '{place}' is empty: drop the row or fill it in")


def _null_in(value: Any, place: str) -> str | None:
    """The place of the first null; None if there is none. A label may be one, which is withheld then."""
    if is_null(value):
        return place
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items() if key != "label"]
    else:
        items = [(str(number), item) for number, item in enumerate(value)] if isinstance(value, list) else []
    return next((found for key, item in items if (found := _null_in(item, f"{place}.{key}"))), None)
