"""Prediction files read back."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpc_dist.config import DataConfig, TaskConfig
from gpc_dist.tasks import Example, Task, file_name, make_task, submission, write_predictions
from gpc_dist.tasks.archive import LINES

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
        ("axb", "AX-b.jsonl", ["not_entailment", "entailment"]),
        ("axg", "AX-g.jsonl", ["not_entailment", "entailment"]),
    ],
)
def test_one_label_per_example(tmp_path: Path, name: str, file: str, labels: list[Any]) -> None:
    rows = (("a", "b"),) * (2 if name == "copa" else 1)
    examples = [Example(4, rows), Example(9, rows)]
    last = np.full(max(0, len(packaged(name).labels) - 2), -9.0)  # of a third label
    outputs = [np.append(output, last) for output in (SECOND, FIRST)]
    written = write_predictions(packaged(name), examples, outputs, tmp_path)
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
    assert row["probabilities"] == pytest.approx({"bad": 0.25, "good": 0.75})

    number = make_task(TaskConfig(name="mine", kind="regression", text=["text"]), DataConfig())
    written = write_predictions(number, [example], [np.array([1.5])], tmp_path)
    assert read_back(written) == [{"id": "x-1", "prediction": 1.5}]
    assert written.name == "predictions.jsonl"


def cells(file: Path, delimiter: str = ",") -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines, delimiter=delimiter))


@pytest.mark.parametrize(("name", "delimiter"), [("out.csv", ","), ("out.tsv", "\t")])
def test_tables_are_csv_where_the_output_is_called_so(tmp_path: Path, name: str, delimiter: str) -> None:
    config = TaskConfig(name="mine", text=["text"], labels=["bad, very", 'go"od'])
    examples = [Example(id, (("text", None),)) for id in ("x-1", 7, date(2024, 5, 1), b"\xff", {"a": 1})]
    outputs = [np.array([0.0, np.log(3)])] * len(examples)
    task = make_task(config, DataConfig())
    rows = cells(write_predictions(task, examples, outputs, tmp_path / name), delimiter)
    assert [row["id"] for row in rows] == ["x-1", "7", "2024-05-01", "\\xff", '{"a": 1}']
    assert {row["prediction"] for row in rows} == {'go"od'}
    assert list(rows[0])[2:] == ["probability_bad, very", 'probability_go"od']
    assert float(rows[0]["probability_bad, very"]) == pytest.approx(0.25)
    lines = read_back(write_predictions(task, examples, outputs, tmp_path / "out.jsonl"))
    assert [row["id"] for row in lines] == ["x-1", 7, "2024-05-01", "\\xff", {"a": 1}]


def test_other_kinds_as_csv(tmp_path: Path) -> None:
    example = Example(4, (("a", "b"),) * 2)
    (row,) = cells(write_predictions(packaged("copa"), [example], [FIRST], tmp_path / "copa.csv"))
    assert list(row) == ["id", "prediction", "probability_0", "probability_1"]
    assert (row["id"], row["prediction"]) == ("4", "0")
    number = make_task(TaskConfig(name="mine", kind="regression", text=["text"]), DataConfig())
    written = write_predictions(number, [example], [np.array([1.5])], tmp_path / "n.csv")
    assert cells(written) == [{"id": "4", "prediction": "1.5"}]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text("old\n")
    task = make_task(TaskConfig(name="mine", kind="regression", text=["text"]), DataConfig())
    endless: list[Any] = []
    endless.append(endless)
    unwritable = Example(endless, (("text", None),))
    with pytest.raises(ValueError, match="Circular"):
        write_predictions(task, [unwritable], [np.array([1.5])], file)
    assert file.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [file]


# As the benchmark's site and its toolkit jiant describe each file: the words or numbers of `label`.
LABELS = {
    "boolq": {"true", "false"},
    "cb": {"entailment", "contradiction", "neutral"},
    "copa": {0, 1},
    "rte": {"entailment", "not_entailment"},
    "wic": {"true", "false"},
    "wsc": {"True", "False"},
    "axb": {"entailment", "not_entailment"},
    "axg": {"entailment", "not_entailment"},
}


def check_submitted(task: str, text: str, rows: Sequence[Any]) -> None:
    """Check a file of a submission against the rows of the test split, in the schema of the official files."""
    lines = [json.loads(line) for line in text.splitlines()]
    if task == "multirc":
        assert [_answers(line) for line in lines] == [_answers(row) for row in rows]
        labels = {a["label"] for line in lines for q in line["passage"]["questions"] for a in q["answers"]}
        assert labels <= {0, 1}
        return
    if task == "record":
        rows = [{"idx": query["idx"], "passage": row["passage"]} for row in rows for query in row["qas"]]
        for line, row in zip(lines, rows, strict=True):
            whole, spans = row["passage"]["text"], row["passage"]["entities"]
            assert line["label"] in {whole[span["start"] : span["end"] + 1] for span in spans}
    else:
        assert {line["label"] for line in lines} <= LABELS[task]
        assert {type(line["label"]) for line in lines} == {type(each) for each in LABELS[task]}
    assert all(line.keys() == {"idx", "label"} for line in lines)
    assert [line["idx"] for line in lines] == [row["idx"] for row in rows]


def _answers(row: Any) -> Any:
    """The ids of a passage, its questions and their answers."""
    questions = row["passage"]["questions"]
    return row["idx"], [(q["idx"], [answer["idx"] for answer in q["answers"]]) for q in questions]


@pytest.mark.parametrize("name", [name for name in LINES if name not in ("record", "axb", "axg")])
def test_the_official_test_splits_as_the_benchmark_asks_for_them(name: str, superglue: Path) -> None:
    folder = superglue / Path(file_name(name)).stem
    task = make_task(TaskConfig(name=name), DataConfig(path=str(folder)))
    examples, draw = task.read("test"), np.random.default_rng(0)
    outputs = [draw.normal(size=max(task.outputs, len(example.rows))) for example in examples]
    text = submission(task, examples, outputs)
    check_submitted(name, text, read_back(folder / "test.jsonl"))
    assert len(text.splitlines()) == LINES[name]
