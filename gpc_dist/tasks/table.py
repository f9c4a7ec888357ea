"""Any user table as a task, from configuration alone."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

from gpc_dist.config import DataConfig, TaskConfig
from gpc_dist.errors import UserError
from gpc_dist.tasks.example import Example, Split, Target
from gpc_dist.tasks.metrics import TABLE_METRICS
from gpc_dist.tasks.read import Row, read_rows
from gpc_dist.tasks.task import Task

_COLUMN = re.compile(r"\{([^{}]+)\}")


def make_table_task(config: TaskConfig, data: DataConfig) -> Task:
    """The task that `config` describes; labels that it does not give are read from the training split.

    Raises:
        UserError: an incomplete description, or (labels not given) an unreadable training split.
    """
    _check_description(config)
    labels: tuple[str, ...] = ()
    if config.kind == "classification":
        labels = tuple(config.labels) if config.labels else _labels_in_train(config, data)
    metrics = TABLE_METRICS[config.kind]
    return Task(
        name=config.name,
        kind=config.kind,
        labels=labels,
        label_words=tuple(label.replace("_", " ") for label in labels),
        metrics=metrics,
        main_metric=config.metric or next(iter(metrics)),
        columns=_columns(config),
        reader=partial(_read, config, data, labels),
        parser=partial(_parse, config, labels),
    )


def _check_description(config: TaskConfig) -> None:
    if config.kind == "choice":
        if len(config.text) > 1 or len(config.choices) < 2:
            raise UserError(
                f"task {config.name} of kind choice needs at most one column in task.text and at "
                f"least two in task.choices (given: {config.text} and {config.choices})"
            )
    elif not 1 <= len(config.text) <= 2:
        raise UserError(f"task {config.name} needs one or two columns in task.text (given: {config.text})")
    if config.labels is not None and len(set(config.labels)) < max(2, len(config.labels)):
        raise UserError(f"task.labels needs two or more different labels (given: {config.labels})")


def _labels_in_train(config: TaskConfig, data: DataConfig) -> tuple[str, ...]:
    source, rows = read_rows(data, "train")
    with_label = [row[config.label] for row in rows if not _is_missing(row.get(config.label))]
    if not with_label:
        raise UserError(f"{source}: {_no_column(config.label, 'task.label', rows[0])}")
    labels = sorted({_label_text(value) for value in with_label})
    if len(labels) < 2:
        raise UserError(
            f"column '{config.label}' of {source} holds the one label '{labels[0]}': "
            "at least two are needed to learn a classification"
        )
    return tuple(labels)


def _read(config: TaskConfig, data: DataConfig, labels: tuple[str, ...], split: Split) -> list[Example]:
    source, rows = read_rows(data, split)
    labelled = split != "test" or any(config.label in row for row in rows)
    return _examples(config, labels, labelled, rows, source)


def _parse(config: TaskConfig, labels: tuple[str, ...], rows: list[Row]) -> list[Example]:
    return _examples(config, labels, False, rows, "the input")


def _columns(config: TaskConfig) -> tuple[str, ...]:
    """The columns that the texts and choices name, alone or in a template."""
    named = [_COLUMN.findall(text) or [text] for text in (*config.text, *config.choices)]
    return tuple(dict.fromkeys(column for columns in named for column in columns))


def _examples(
    config: TaskConfig, labels: tuple[str, ...], labelled: bool, rows: list[Row], source: str
) -> list[Example]:
    examples = []
    for number, row in enumerate(rows):
        try:
            examples.append(_example(config, labels, labelled, number, row))
        except UserError as error:
            raise UserError(f"row {number + 1} of {source}: {error}") from None
    return examples


def _example(config: TaskConfig, labels: tuple[str, ...], labelled: bool, number: int, row: Row) -> Example:
    texts = [_text(row, template, "task.text") for template in config.text]
    candidates = tuple(_text(row, template, "task.choices") for template in config.choices)
    rows: tuple[tuple[str, str | None], ...]
    if config.kind == "choice":
        rows = tuple((texts[0], c) if texts else (c, None) for c in candidates)
    else:
        rows = ((texts[0], texts[1] if len(texts) == 2 else None),)
    return Example(
        id=row.get("id", row.get("idx", number)),
        rows=rows,
        target=_target(config, labels, row) if labelled else None,
        meta={"candidates": candidates} if candidates else {},
    )


def _text(row: Row, template: str, key: str) -> str:
    """The text of a column, or of a template with `{column}` places, in a row."""
    if template in row or not _COLUMN.search(template):
        return _cell(row, template, key)
    return _COLUMN.sub(lambda place: _cell(row, place[1], key), template)


def _cell(row: Row, column: str, key: str) -> str:
    if column not in row:
        raise UserError(_no_column(column, key, row))
    if _is_null(row[column]):
        raise UserError(f"column '{column}' is empty: drop the row or fill it in")
    return str(row[column])


def _no_column(column: str, key: str, row: Row) -> str:
    return f"there is no column '{column}' ({key}); there are: {', '.join(row)}"


def _target(config: TaskConfig, labels: tuple[str, ...], row: Row) -> Target:
    if config.label not in row:
        raise UserError(_no_column(config.label, "task.label", row))
    value = row[config.label]
    if _is_missing(value):
        return None
    if config.kind == "regression":
        return _number(value)
    label = _label_text(value)
    if label == "-1" and label not in labels:
        return None  # how files exported from the Hub write a withheld label
    if config.kind == "choice":
        return (_choice(label, len(config.choices)),)
    if label not in labels:
        raise UserError(
            f"label '{label}' is none of the labels learnt from the training split "
            f"({', '.join(labels)}): correct it, or list all labels in task.labels"
        )
    return labels.index(label)


def _is_missing(value: Any) -> bool:
    return _is_null(value) or value == ""


def _is_null(value: Any) -> bool:
    """Whether a value is None, or the NaN that stands for None in data frames."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _label_text(value: Any) -> str:
    """One spelling of a label for all types that files give it: `3` for 3, 3.0 and `3`; `true` for True."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"label {value!r} is not a finite number, as task.kind regression needs")
    return number


def _choice(label: str, choices: int) -> int:
    if not label.isdecimal() or int(label) >= choices:
        raise UserError(
            f"label '{label}' is not the index of a choice: use 0 to {choices - 1}, "
            "in the order of task.choices"
        )
    return int(label)
