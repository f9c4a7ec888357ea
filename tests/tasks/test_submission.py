"""Prediction files read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpc_dist.config import DataConfig, TaskConfig
from gpc_dist.tasks import Example, Task, make_task, write_predictions

SECOND, FIRST = np.array([0.0, 1.0]), np.array([1.0, 0.0])


def packaged(name: str) -> Task:
    return make_task(TaskConfig(name=name), DataConfig())


def read_back(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("name", "file", "labels"),
    [
        ("boolq", "BoolQ.jsonl", ["true", "false"]),
        ("cb", "CB.jsonl", ["contradiction", "entailment"]),
        ("copa", "COPA.jsonl", [1, 0]),
        ("rte", "RTE.jsonl", ["not_entailment", "entailment"]),
        ("wic", "WiC.jsonl", ["true", "false"]),
        ("wsc", "WSC.jsonl", ["True", "False"]),
    ],
)
def test_one_label_per_example(tmp_path: Path, name: str, file: str, labels: list[Any]) -> None:
    rows = (("a", "b"),) * (2 if name == "copa" else 1)
    examples = [Example(4, rows), Example(9, rows)]
    written = write_predictions(packaged(name), examples, [SECOND, FIRST], tmp_path)
    assert written == tmp_path / file
    assert read_back(written) == [
        {"idx": idx, "label": label} for idx, label in zip((4, 9), labels, strict=True)
    ]


def test_multirc_is_nested(tmp_path: Path) -> None:
    examples = [
        Example({"paragraph": p, "question": q, "answer": a}, (("text", "answer"),))
        for p, q, a in [(0, 0, 0), (0, 0, 1), (0, 1, 2), (3, 7, 9)]
    ]
    outputs = [SECOND, FIRST, SECOND, SECOND]
    assert read_back(write_predictions(packaged("multirc"), examples, outputs, tmp_path)) == [
        {
            "idx": 0,
            "passage": {
                "questions": [
                    {"idx": 0, "answers": [{"idx": 0, "label": 1}, {"idx": 1, "label": 0}]},
                    {"idx": 1, "answers": [{"idx": 2, "label": 1}]},
                ]
            },
        },
        {"idx": 3, "passage": {"questions": [{"idx": 7, "answers": [{"idx": 9, "label": 1}]}]}},
    ]


def test_record_names_the_entity(tmp_path: Path) -> None:
    example = Example(
        {"passage": 1, "query": 6},
        (("passage", "query"),) * 3,
        meta={"candidates": ("Oslo", "Tromsø", "Bergen"), "answers": ()},
    )
    outputs = [np.array([0.1, 3.0, -1.0])]
    file = write_predictions(packaged("record"), [example], outputs, tmp_path)
    assert file.name == "ReCoRD.jsonl"
    assert read_back(file) == [{"idx": 6, "label": "Tromsø"}]


def test_tables(tmp_path: Path) -> None:
    config = TaskConfig(name="mine", text=["text"], labels=["bad", "good"])
    task = make_task(config, DataConfig())
    file = tmp_path / "deep" / "out.jsonl"
    example = Example("x-1", (("text", None),))
    assert write_predictions(task, [example], [np.array([0.0, np.log(3)])], file) == file
    (row,) = read_back(file)
    assert (row["id"], row["prediction"]) == ("x-1", "good")
    assert row["probabilities"] == pytest.approx([0.25, 0.75])

    number = make_task(TaskConfig(name="mine", kind="regression", text=["text"]), DataConfig())
    written = write_predictions(number, [example], [np.array([1.5])], tmp_path)
    assert read_back(written) == [{"id": "x-1", "prediction": 1.5}]
    assert written.name == "predictions.jsonl"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text("old\n")
    task = make_task(TaskConfig(name="mine", kind="regression", text=["text"]), DataConfig())
    unwritable = Example(object(), (("text", None),))
    with pytest.raises(TypeError):
        write_predictions(task, [unwritable], [np.array([1.5])], file)
    assert file.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [file]
