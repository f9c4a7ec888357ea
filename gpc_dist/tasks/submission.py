"""Prediction files: SuperGLUE's own submission format, and JSON Lines for everything else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpc_dist.files import write_text
from gpc_dist.tasks.example import Example
from gpc_dist.tasks.task import Prediction, Task

Predicted = Sequence[tuple[Example, Prediction]]


def write_predictions(
    task: Task, examples: Sequence[Example], outputs: Sequence[np.ndarray], path: Path
) -> Path:
    """Writes what the outputs predict for the examples and returns the file written.

    A packaged task is written in the submission format of super.gluebenchmark.com; any other as one
    object per example: `id`, `prediction` (label, number of the choice, or number) and, unless it
    is a regression, `probabilities`. The file appears whole or not at all.

    Args:
        outputs: an array per example, as in `Task`.
        path: the file, or a folder to write it in under the name that the benchmark wants
            (`predictions.jsonl` for tables).
    """
    name, form = _FORMATS.get(task.name, ("predictions.jsonl", _table))
    file = path if path.suffix and not path.is_dir() else path / name
    predicted = list(zip(examples, task.predictions(examples, outputs), strict=True))
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in form(predicted))
    write_text(file, "".join(lines))
    return file


def _table(predicted: Predicted) -> Iterable[dict[str, Any]]:
    for _, prediction in predicted:
        row = {"id": prediction.id, "prediction": prediction.value}
        if prediction.probabilities is not None:
            row["probabilities"] = prediction.probabilities
        yield row


def _plain(predicted: Predicted) -> Iterable[dict[str, Any]]:
    for _, prediction in predicted:
        yield {"idx": prediction.id, "label": prediction.value}


def _capitalized(predicted: Predicted) -> Iterable[dict[str, Any]]:
    for _, prediction in predicted:
        yield {"idx": prediction.id, "label": str(prediction.value).capitalize()}


def _multirc(predicted: Predicted) -> Iterable[dict[str, Any]]:
    passages: dict[int, dict[int, list[dict[str, int]]]] = {}
    for _, prediction in predicted:
        idx = prediction.id
        answers = passages.setdefault(idx["paragraph"], {}).setdefault(idx["question"], [])
        answers.append({"idx": idx["answer"], "label": int(prediction.value == "true")})
    for passage, questions in passages.items():
        nested = [{"idx": idx, "answers": answers} for idx, answers in questions.items()]
        yield {"idx": passage, "passage": {"questions": nested}}


def _record(predicted: Predicted) -> Iterable[dict[str, Any]]:
    for example, prediction in predicted:
        entity = example.meta["candidates"][prediction.value]
        yield {"idx": prediction.id["query"], "label": entity}


_FORMATS: dict[str, tuple[str, Callable[[Predicted], Iterable[dict[str, Any]]]]] = {
    "boolq": ("BoolQ.jsonl", _plain),
    "cb": ("CB.jsonl", _plain),
    "copa": ("COPA.jsonl", _plain),
    "multirc": ("MultiRC.jsonl", _multirc),
    "record": ("ReCoRD.jsonl", _record),
    "rte": ("RTE.jsonl", _plain),
    "wic": ("WiC.jsonl", _plain),
    "wsc": ("WSC.jsonl", _capitalized),
}
