"""Any user table as a task, from configuration alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial

from gpc_dist.config import DataConfig, TaskConfig
from gpc_dist.errors import UserError
from gpc_dist.tasks.example import Example, Split, Target
from gpc_dist.tasks.formats import Row
from gpc_dist.tasks.metrics import TABLE_METRICS
from gpc_dist.tasks.read import Source, read_rows, the_input
from gpc_dist.tasks.task import Task
from gpc_dist.tasks.values import in_column, is_null, label_of, likeliest, near_equal, text_of

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
    if config.labels is not None and len(set(map(label_of, config.labels))) < max(2, len(config.labels)):
        raise UserError(f"task.labels needs two or more different labels (given: {config.labels})")


def _labels_in_train(config: TaskConfig, data: DataConfig) -> tuple[str, ...]:
    source, rows = read_rows(data, "train")
    counts: Counter[str] = Counter()
    for number, row in enumerate(rows):
        with source.at(number):
            counts[in_column(config.label, label_of, row.get(config.label))] += 1
    del counts[""]  # missing ones
    if not counts:
        raise UserError(f"{source}: {_no_column(config.label, 'task.label', rows[0])}")
    if groups := near_equal(counts):
        raise UserError(
            f"column '{config.label}' of {source} has labels that are nearly equal: {'; '.join(groups)}: "
            "correct them, or list all labels that are meant in task.labels"
        )
    labels = sorted(counts)
    if len(labels) < 2:
        raise UserError(
            f"column '{config.label}' of {source} holds the one label '{labels[0]}': "
            "at least two are needed to learn a classification"
        )
    return tuple(labels)


def _read(config: TaskConfig, data: DataConfig, labels: tuple[str, ...], split: Split) -> list[Example]:
    source, rows = read_rows(data, split)
    return _examples(config, labels, rows, source, labelled=split != "test")


def _parse(config: TaskConfig, labels: tuple[str, ...], rows: list[Row]) -> list[Example]:
    return _examples(config, labels, rows, the_input(rows), labelled=False)


def _columns(config: TaskConfig) -> tuple[str, ...]:
    """The columns that the texts and choices name, alone or in a template."""
    named = [_COLUMN.findall(text) or [text] for text in (*config.text, *config.choices)]
    return tuple(dict.fromkeys(column for columns in named for column in columns))


def _examples(
    config: TaskConfig, labels: tuple[str, ...], rows: list[Row], source: Source, labelled: bool
) -> list[Example]:
    classes = {label_of(label): index for index, label in enumerate(labels)}
    examples = []
    for number, row in enumerate(rows):
        with source.at(number):
            target = _target(config, classes, row) if labelled else None
            examples.append(_example(config, number, row, target))
    return examples


def _example(config: TaskConfig, number: int, row: Row, target: Target) -> Example:
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
        target=target,
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
    if is_null(row[column]):
        raise UserError(f"column '{column}' is empty: drop the row or fill it in")
    return in_column(column, text_of, row[column])


def _no_column(column: str, key: str, row: Row) -> str:
    said = f"there is no column '{column}' ({key}); there are: {', '.join(row)}"
    if len(row) == 1 and (found := re.search(r"[;|\t]", next(iter(row)))):
        said += f": they seem to be separated by {found[0]!r}: write a CSV file with commas, or a TSV file with tabs"
    return said


def _target(config: TaskConfig, classes: Mapping[str, int], row: Row) -> Target:
    if config.label not in row:
        raise UserError(_no_column(config.label, "task.label", row))
    label = in_column(config.label, label_of, row[config.label])
    if not label:
        return None
    if config.kind == "regression":
        return _number(label)
    if label == "-1" and label not in classes:
        return None  # how files exported from the Hub write a withheld label
    if config.kind == "choice":
        return (_choice(label, len(config.choices)),)
    if label not in classes:
        meant = likeliest(label, classes)
        raise UserError(
            f"label '{label}' is none of the labels learnt from the training split ({', '.join(classes)}): "
            f"correct it{f' (is it {meant}?)' if meant else ''}, or list all labels in task.labels"
        )
    return classes[label]


def _number(label: str) -> float:
    try:
        number = float(label)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"label '{label}' is not a finite number, as task.kind regression needs")
    return number


def _choice(label: str, choices: int) -> int:
    if not label.isdecimal() or int(label) >= choices:
        raise UserError(
            f"label '{label}' is not the index of a choice: use 0 to {choices - 1}, "
            "in the order of task.choices"
        )
    return int(label)
