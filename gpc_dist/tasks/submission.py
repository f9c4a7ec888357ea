"""Prediction files: the benchmarks' own submission formats, and JSON Lines or CSV for everything else."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpc_dist.files import write_text
from gpc_dist.tasks import diagnostics, glue
from gpc_dist.tasks.delimited import DELIMITERS
from gpc_dist.tasks.example import Example
from gpc_dist.tasks.task import Prediction, Task

Predicted = Sequence[tuple[Example, Prediction]]


def write_predictions(
    task: Task, examples: Sequence[Example], outputs: Sequence[np.ndarray], path: Path
) -> Path:
    """Write the predictions for the examples atomically; returns the file.

    Packaged tasks have the submission format of super.gluebenchmark.com (SST-2 and CoLA: of
    gluebenchmark.com, a TSV file). Other tasks have one JSON object per example: `id`, `prediction`
    (label, number of the choice, or number) and, unless it is a regression, `probabilities` by label or number.
    Any task has a line with the columns `id`, `prediction` and `probability_<label>` in a `.csv` file, and all but
    the packaged ones in a `.tsv` file.

    Args:
        outputs: an array per example, as in `Task`.
        path: the file, or a folder in which it gets the name that the benchmark asks for
            (`predictions.jsonl` for tables).
    """
    file = path if path.suffix and not path.is_dir() else path / file_name(task.name)
    if file.suffix == ".csv" or (file.suffix in DELIMITERS and task.name not in _FORMATS):
        write_text(file, _delimited(_predicted(task, examples, outputs), DELIMITERS[file.suffix]))
    else:
        write_text(file, submission(task, examples, outputs))
    return file


def file_name(task: str) -> str:
    """The name that a task's benchmark asks for, or `predictions.jsonl`."""
    return _FORMATS[task][0] if task in _FORMATS else "predictions.jsonl"


def submission(task: Task, examples: Sequence[Example], outputs: Sequence[np.ndarray]) -> str:
    """The content of the file with the predictions for the examples: lines, in the format of the task's benchmark if it
    has one. Arguments as of `write_predictions`."""
    _, form = _FORMATS.get(task.name, ("", _table))
    return "".join(f"{line}\n" for line in form(_predicted(task, examples, outputs)))


def _predicted(task: Task, examples: Sequence[Example], outputs: Sequence[np.ndarray]) -> Predicted:
    return list(zip(examples, task.predictions(examples, outputs), strict=True))


def _delimited(predicted: Predicted, delimiter: str) -> str:
    rows = [
        {"id": _cell(prediction.id), "prediction": prediction.value}
        | {f"probability_{name}": share for name, share in (prediction.probabilities or {}).items()}
        for _, prediction in predicted
    ]
    columns = dict.fromkeys(column for row in rows for column in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    """A value for CSV: an object or a list as JSON."""
    return json.dumps(value) if isinstance(value, dict | list) else _as_text(value)


def _as_text(value: Any) -> Any:
    """A value that JSON does not have, such as the date of a Parquet file, as text; others as they are."""
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return value if isinstance(value, str | int | float | None) else str(value)


def _json_lines(
    rows: Callable[[Predicted], Iterable[dict[str, Any]]],
) -> Callable[[Predicted], Iterable[str]]:
    """Let a format that yields objects yield lines of JSON."""
    return lambda predicted: (
        json.dumps(row, ensure_ascii=False, default=_as_text) for row in rows(predicted)
    )


@_json_lines
def _table(predicted: Predicted) -> Iterable[dict[str, Any]]:
    for _, prediction in predicted:
        row = {"id": prediction.id, "prediction": prediction.value}
        if prediction.probabilities is not None:
            row["probabilities"] = prediction.probabilities
        yield row


@_json_lines
def _plain(predicted: Predicted) -> Iterable[dict[str, Any]]:
    for _, prediction in predicted:
        yield {"idx": prediction.id, "label": prediction.value}


@_json_lines
def _capitalized(predicted: Predicted) -> Iterable[dict[str, Any]]:
    for _, prediction in predicted:
        yield {"idx": prediction.id, "label": str(prediction.value).capitalize()}


@_json_lines
def _multirc(predicted: Predicted) -> Iterable[dict[str, Any]]:
    passages: dict[int, dict[int, list[dict[str, int]]]] = {}
    for _, prediction in predicted:
        idx = prediction.id
        answers = passages.setdefault(idx["paragraph"], {}).setdefault(idx["question"], [])
        answers.append({"idx": idx["answer"], "label": int(prediction.value == "true")})
    for passage, questions in passages.items():
        nested = [{"idx": idx, "answers": answers} for idx, answers in questions.items()]
        yield {"idx": passage, "passage": {"questions": nested}}


@_json_lines
def _record(predicted: Predicted) -> Iterable[dict[str, Any]]:
    for example, prediction in predicted:
        entity = example.meta["candidates"][prediction.value]
        yield {"idx": prediction.id["query"], "label": entity}


def _glue(labels: Sequence[str], predicted: Predicted) -> Iterable[str]:
    """GLUE identifies examples by their position in the file, and labels by class indices."""
    yield "index\tprediction"
    for place, (_, prediction) in enumerate(predicted):
        yield f"{place}\t{labels.index(str(prediction.value))}"


_FORMATS: dict[str, tuple[str, Callable[[Predicted], Iterable[str]]]] = {
    **{name: (str(spec.file), _plain) for name, spec in diagnostics.SPECS.items()},
    "boolq": ("BoolQ.jsonl", _plain),
    "cb": ("CB.jsonl", _plain),
    "cola": ("CoLA.tsv", partial(_glue, glue.SPECS["cola"].labels)),
    "copa": ("COPA.jsonl", _plain),
    "multirc": ("MultiRC.jsonl", _multirc),
    "record": ("ReCoRD.jsonl", _record),
    "rte": ("RTE.jsonl", _plain),
    "sst2": ("SST-2.tsv", partial(_glue, glue.SPECS["sst2"].labels)),
    "wic": ("WiC.jsonl", _plain),
    "wsc": ("WSC.jsonl", _capitalized),
}
