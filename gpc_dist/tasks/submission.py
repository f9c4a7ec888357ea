"""Prediction files: the benchmarks' own submission formats, and JSON Lines for everything else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpc_dist.files import write_text
from gpc_dist.tasks import glue
from gpc_dist.tasks.example import Example
from gpc_dist.tasks.task import Prediction, Task

Predicted = Sequence[tuple[Example, Prediction]]


def write_predictions(
    task: Task, examples: Sequence[Example], outputs: Sequence[np.ndarray], path: Path
) -> Path:
    """Write the predictions for the examples atomically; returns the file.

    Packaged tasks have the submission format of super.gluebenchmark.com (SST-2 and CoLA: of
    gluebenchmark.com, a TSV file). Other tasks have one JSON object per example: `id`, `prediction`
    (label, number of the choice, or number) and, unless it is a regression, `probabilities`.

    Args:
        outputs: an array per example, as in `Task`.
        path: the file, or a folder in which it gets the name that the benchmark asks for
            (`predictions.jsonl` for tables).
    """
    name, form = _FORMATS.get(task.name, ("predictions.jsonl", _table))
    file = path if path.suffix and not path.is_dir() else path / name
    predicted = list(zip(examples, task.predictions(examples, outputs), strict=True))
    write_text(file, "".join(f"{line}\n" for line in form(predicted)))
    return file


def _json_lines(
    rows: Callable[[Predicted], Iterable[dict[str, Any]]],
) -> Callable[[Predicted], Iterable[str]]:
    """Let a format that yields objects yield lines of JSON."""
    return lambda predicted: (json.dumps(row, ensure_ascii=False) for row in rows(predicted))


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
