"""User tables: a task from configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpc_dist.config import DataConfig, TaskConfig, build
from gpc_dist.errors import UserError
from gpc_dist.tasks import Task, make_task

MOODS = [
    {"title": "Rain", "body": "It poured.", "mood": "quite_bad", "id": "r-1"},
    {"title": "Sun", "body": "It shone.", "mood": "good", "id": "r-2"},
]


def table(folder: Path, **task: Any) -> Task:
    return make_task(TaskConfig(**{"name": "mine", **task}), DataConfig(path=str(folder)))


def test_classification_with_labels_from_the_training_split(write_rows: Any) -> None:
    folder = write_rows(train=MOODS, val=MOODS[::-1])
    task = table(folder, text=["body"], label="mood")
    assert (task.labels, task.outputs) == (("good", "quite_bad"), 2)
    assert task.label_words == ("good", "quite bad")
    assert (task.metric_names, task.main_metric) == (
        ("accuracy", "f1_macro", "matthews"),
        "accuracy",
    )
    train = task.read("train")
    assert [(e.id, e.rows, e.target) for e in train] == [
        ("r-1", (("It poured.", None),), 1),
        ("r-2", (("It shone.", None),), 0),
    ]
    outputs = [np.array([0.0, 1.0]), np.array([1.0, 0.0])]
    assert task.score(train, outputs) == {"accuracy": 1.0, "f1_macro": 1.0, "matthews": 1.0}


def test_templates_and_two_segments(write_rows: Any) -> None:
    folder = write_rows(train=MOODS)
    task = table(folder, text=["{title} ({id})", "body"], label="mood")
    assert task.read("train")[0].rows == (("Rain (r-1)", "It poured."),)


@pytest.mark.parametrize(
    "content",
    [
        ("train.csv", "text,label\na,0\nb,10\nc,9\n"),
        ("train.tsv", "text\tlabel\na\t0\nb\t10\nc\t9\n"),
        ("train.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "label": 10.0}\n'
                        '{"text": "c", "label": "9"}\n'),
    ],
    ids=["csv", "tsv", "jsonl"],
)  # fmt: skip
def test_labels_are_the_same_in_every_format(tmp_path: Path, content: tuple[str, str]) -> None:
    (tmp_path / content[0]).write_text(content[1])
    task = table(tmp_path, text=["text"])
    assert task.labels == ("0", "10", "9")
    assert [e.target for e in task.read("train")] == [0, 1, 2]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": "a", "label": True}, {"text": "b", "label": False}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    task = table(tmp_path, text=["text"])
    assert task.labels == ("false", "true")
    assert [(e.id, e.target) for e in task.read("train")] == [(0, 1), (1, 0)]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["pos", "pos ", " neg", "\tneg\u00a0"], ["pos", "pos", "neg", "neg"]),
        (["caf\u00e9", "cafe\u0301", "bar"], ["caf\u00e9", "caf\u00e9", "bar"]),
        ([True, "True", "TRUE ", "false"], ["true", "true", "true", "false"]),
        ([1, 1.0, "1.0", "1.00", " 1", "0.5", 0.5], ["1", "1", "1", "1", "1", "0.5", "0.5"]),
        (["1.10", "1.25", "v1.0"], ["1.10", "1.25", "v1.0"]),
        (["a-1", "a+1", "C", "C++"], ["a-1", "a+1", "C", "C++"]),
        (["-1", "1", "+", "-"], [None, "1", "+", "-"]),
    ],
)
def test_a_label_has_one_spelling(write_rows: Any, values: list[Any], labels: list[str]) -> None:
    rows = [{"text": "a", "label": value} for value in values]
    found = table(
        write_rows(train=rows), text=["text"], labels=sorted({one for one in labels if one} | {"z"})
    )
    assert [e.target if e.target is None else found.labels[e.target] for e in found.reader("train")] == labels  # type: ignore[index]
    if None not in labels:
        assert table(write_rows(train=rows), text=["text"]).labels == tuple(sorted(set(labels)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["pos", "neg", "Pos", "pos "], r"column 'label' of .*train.jsonl has labels that are nearly equal: "
                                        r"'pos' \(2 rows\) and 'Pos' \(1 row\): correct them, or list all"),
        (["not_entailed", "not entailed", "Not-Entailed", "x"], r"'not_entailed' .* and 'not entailed' .* and 'Not-E"),
        (["01", "1", "1.50", "1.5"], r"'01' \(1 row\) and '1' \(1 row\); '1.50' .* and '1.5'"),
        (["a\u200bb", "ab"], r"and 'ab' \(1 row\)"),
        (["Stra\u00dfe", "STRASSE"], "'Stra\u00dfe' .* and 'STRASSE'"),
        (["\uff41", "a"], "and 'a'"),
    ],
)  # fmt: skip
def test_labels_that_are_nearly_equal_are_named_with_their_counts(
    write_rows: Any, values: list[str], message: str
) -> None:
    folder = write_rows(train=[{"text": "a", "label": value} for value in values])
    with pytest.raises(UserError, match=message):
        table(folder, text=["text"])
    meant = table(folder, text=["text"], labels=sorted({value.strip() for value in values}))
    assert len(meant.read("train")) == len(values)


def test_a_label_that_is_only_nearly_known_is_answered_with_the_known_one(write_rows: Any) -> None:
    folder = write_rows(val=[{"text": "a", "label": "POS"}])
    with pytest.raises(UserError, match=r"row 1 of .*label 'POS' is none of .* \(is it pos\?\)"):
        table(folder, text=["text"], labels=["neg", "pos"]).read("validation")


@pytest.mark.parametrize("sign", [";", "|"])
def test_columns_that_are_separated_otherwise_are_named(tmp_path: Path, sign: str) -> None:
    (tmp_path / "train.csv").write_text(f"text{sign}label\nfine{sign}pos\nbad{sign}neg\n")
    task = TaskConfig(name="t", text=["text"], label="label")
    with pytest.raises(
        UserError, match=f"they seem to be separated by '[{sign}]': write a CSV file with commas"
    ):
        make_task(task, DataConfig(path=str(tmp_path)))


def test_bytes_are_decoded_and_what_is_no_text_is_named_by_row_and_column(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(**columns: Any) -> None:
        columns = {"text": ["a", "b"], "label": ["x", "y"], **columns}
        pq.write_table(pa.table(columns), tmp_path / "train.parquet")

    write(text=["Öl".encode(), b"b"], label=[b"x ", "ÿ".encode()])
    train = table(tmp_path, text=["text"]).read("train")
    assert [(e.rows[0][0], e.target) for e in train] == [("Öl", 0), ("b", 1)]
    write(text=[1, 2], when=pa.array([1, 2], pa.date32()), sure=[True, False], share=[1.5, 2.0])
    (row, _) = table(tmp_path, text=["{text} {when} {sure} {share}"]).read("train")
    assert row.rows == (("1 1970-01-02 true 1.5", None),)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"text": [["a"], ["b"]]}, r"row 1 of .*train.parquet: column 'text' holds a list"),
        ({"text": [{"de": "b"}, None]}, r"row 1 of .*: column 'text' holds an object"),
        ({"text": [b"b", b"\xff"]}, r"row 2 of .*: column 'text' holds bytes that are not UTF-8"),
        ({"label": [["x"], ["y"]]}, r"row 1 of .*: column 'label' holds a list: write one text or number"),
        ({"label": [{"is": "x"}, {"is": "y"}]}, r"row 1 of .*: column 'label' holds an object"),
    ]
    for columns, message in wrong:
        write(**columns)
        with pytest.raises(UserError, match=message):
            table(tmp_path, text=["text"]).read("train")


def test_given_labels_fix_the_order_and_spare_the_training_split(write_rows: Any) -> None:
    folder = write_rows(val=[{"text": "a", "label": 2}])
    config = build({"task": {"name": "mine", "text": ["text"], "labels": [3, 2]}}).task
    task = make_task(config, DataConfig(path=str(folder)))
    assert task.labels == ("3", "2")
    assert task.read("validation")[0].target == 1


def test_choice(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("why,a,b,answer\nrain,wet,dry,0\nsun,wet,dry,1\n")
    task = table(tmp_path, kind="choice", text=["why: {why}"], choices=["a", "so {b}"], label="answer")
    assert (task.outputs, task.labels, task.metric_names) == (1, (), ("accuracy",))
    first, second = task.read("train")
    assert first.rows == (("why: rain", "wet"), ("why: rain", "so dry"))
    assert (first.target, second.target) == ((0,), (1,))
    assert first.meta["candidates"] == ("wet", "so dry")
    assert task.score([first, second], [np.array([1.0, 0.0])] * 2) == {"accuracy": 0.5}


def test_regression(write_rows: Any) -> None:
    rows = [{"text": str(n), "label": label} for n, label in enumerate([1, "2.5", 4.0])]
    task = table(write_rows(train=rows), kind="regression", text=["text"], metric="rmse")
    assert (task.outputs, task.main_metric, task.greater_is_better) == (1, "rmse", False)
    train = task.read("train")
    assert [e.target for e in train] == [1.0, 2.5, 4.0]
    assert all(isinstance(e.target, float) for e in train)
    perfect = task.score(train, [np.array([1.0]), np.array([2.5]), np.array([4.0])])
    assert perfect == {"pearson": pytest.approx(1), "spearman": pytest.approx(1), "rmse": 0.0}


def test_a_test_split_needs_no_labels(write_rows: Any) -> None:
    unlabelled = [{k: v for k, v in row.items() if k != "mood"} for row in MOODS]
    folder = write_rows(train=MOODS, val=unlabelled, test=unlabelled)
    task = table(folder, text=["body"], label="mood")
    assert [e.target for e in task.read("test")] == [None, None]
    for label in (-1, "?", "", "good", [1]):
        folder = write_rows(test=[{**row, "mood": label} for row in MOODS])
        assert [(e.id, e.target) for e in task.read("test")] == [("r-1", None), ("r-2", None)]
    write_rows(val=[{**MOODS[0], "mood": -1}])
    with pytest.raises(UserError, match="has no label at example r-1"):
        task.read("validation")
    write_rows(val=unlabelled)
    with pytest.raises(UserError, match=r"row 1 of .*val.jsonl: there is no column 'mood' \(task"):
        task.read("validation")


def test_rows_of_no_data_set_are_parsed_without_labels(write_rows: Any) -> None:
    task = table(write_rows(train=MOODS), text=["{title}: {body}"], label="mood")
    assert task.columns == ("title", "body")
    (example,) = task.parse([{"title": "Fog", "body": "It hid.", "mood": "unheard of"}])
    assert (example.rows, example.target) == ((("Fog: It hid.", None),), None)
    with pytest.raises(UserError, match=r"row 1 of the input: there is no column 'body'"):
        task.parse([{"title": "Fog"}])
    with pytest.raises(UserError, match=r"row 1 of the input: column 'body' is empty"):
        task.parse([{"title": "Fog", "body": float("nan")}])


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "rtee"}, r"unknown task 'rtee': use a packaged one \(boolq, cb, .*describe a t"),
        ({"name": "rte", "text": ["body"]}, "'rte' is a packaged task, but"),
        ({"text": ["a", "b", "c"]}, "needs one or two columns in task.text"),
        ({"kind": "choice", "text": ["a"], "choices": ["b"]}, "at least two in task.choices"),
        ({"text": ["body"], "labels": ["x", "x "]}, "two or more different labels"),
        ({"text": ["body"], "label": "mod"}, "no column 'mod' .* there are: title, body, mood, id"),
        ({"text": ["body"], "label": "mood", "metric": "bleu"}, "task.metric to one of accuracy"),
    ],
)
def test_a_wrong_description_is_explained(write_rows: Any, task: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        table(write_rows(train=MOODS), **task)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ({"text": ["bdy"]}, {}, r"row 1 .*no column 'bdy' \(task.text\); there are: title, body"),
        ({"text": ["{titel}!"]}, {}, "no column 'titel'"),
        ({}, {"mood": "odd"}, "row 3 of .*: label 'odd' is none of the labels .*good, quite_bad"),
        ({}, {"body": None}, "row 3 of .*: column 'body' is empty"),
        ({}, {"mood": None}, "has no label at example r-3"),
        ({"kind": "regression"}, {}, "row 1 of .*'quite_bad' is not a finite number"),
        (
            {"kind": "choice", "choices": ["title", "id"], "text": []},
            {},
            "row 1 of .*'quite_bad' is not the index of a choice: use 0 to 1",
        ),
        (
            {"kind": "choice", "choices": ["title", "id"], "text": [], "label": "right"},
            {"right": 2},
            "row 3 of .*'2' is not the index of a choice: use 0 to 1",
        ),
    ],
)
def test_a_wrong_row_is_named(
    write_rows: Any, task: dict[str, Any], row: dict[str, Any], message: str
) -> None:
    extra = {"title": "Wind", "body": "It blew.", "mood": "good", "id": "r-3", **row}
    folder = write_rows(train=MOODS, val=[*({**mood, "right": 0} for mood in MOODS), extra])
    with pytest.raises(UserError, match=message):
        table(folder, **{"text": ["body"], "label": "mood", **task}).read("validation")


def test_one_label_is_nothing_to_learn(write_rows: Any) -> None:
    with pytest.raises(UserError, match=r"column 'mood' of .* holds the one label 'good'"):
        table(write_rows(train=MOODS[1:]), text=["body"], label="mood")
