"""The eight tasks, from rows in the schema of the official files and in that of the Hub."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from gpc_dist.config import DataConfig, TaskConfig
from gpc_dist.errors import UserError
from gpc_dist.tasks import Example, make_task
from gpc_dist.tasks.packaged import adapt_rows
from gpc_dist.tasks.read import the_input
from gpc_dist.tasks.superglue import SPECS

PROJECT = Path(__file__).parents[2]
NAMES = tuple(SPECS)

# Official row counts, where a MultiRC example is one answer and a ReCoRD example one query.
COUNTS = {
    "boolq": ("BoolQ", 9427, 3270),
    "cb": ("CB", 250, 56),
    "copa": ("COPA", 400, 100),
    "multirc": ("MultiRC", 27243, 4848),
    "record": ("ReCoRD", 32, 32),
    "rte": ("RTE", 2490, 277),
    "wic": ("WiC", 5428, 638),
    "wsc": ("WSC", 554, 104),
}

# Right validation examples of the most frequent training class or candidate position, counted in the files.
BASELINES = {
    "boolq": {"accuracy": 2033 / 3270},
    "cb": {"accuracy": 28 / 56, "f1_macro": 2 / 9, "average": (28 / 56 + 2 / 9) / 2},
    "copa": {"accuracy": 45 / 100},
    "multirc": {"f1_a": 0.0, "exact_match": 3 / 953, "average": 3 / 953 / 2},
    "record": {"f1": 9 / 32, "exact_match": 9 / 32, "average": 9 / 32},
    "rte": {"accuracy": 146 / 277},
    "wic": {"accuracy": 319 / 638},
    "wsc": {"accuracy": 66 / 104},
}

FILE_ROWS: dict[str, list[dict[str, Any]]] = {
    "boolq": [{"question": "is tin a metal", "passage": "Tin is a soft metal.", "idx": 7, "label": True}],
    "cb": [{"premise": "I doubt it rained.", "hypothesis": "it rained", "idx": 0, "label": "neutral"}],
    "copa": [
        {
            "premise": "The kettle whistled.",
            "choice1": "The water boiled.",
            "choice2": "The cup fell.",
            "question": "cause",
            "idx": 3,
            "label": 0,
        }
    ],
    "multirc": [
        {
            "idx": 4,
            "passage": {
                "text": "Ada fed the goats. Then she slept.",
                "questions": [
                    {
                        "idx": 8,
                        "question": "Who ate?",
                        "answers": [
                            {"idx": 20, "text": "The goats", "label": 1},
                            {"idx": 21, "text": "The hens", "label": 0},
                        ],
                    },
                    {
                        "idx": 9,
                        "question": "Who slept?",
                        "answers": [{"idx": 22, "text": "Ada", "label": 1}],
                    },
                ],
            },
        }
    ],
    "record": [
        {
            "idx": 5,
            "passage": {
                "text": "Oslo beat Bergen.\n@highlight\nOslo won\n@highlight\nBergen lost",
                "entities": [
                    {"start": 0, "end": 3},
                    {"start": 10, "end": 15},
                    {"start": 29, "end": 32},
                ],
            },
            "qas": [
                {
                    "idx": 11,
                    "query": "Fans of @placeholder sang.",
                    "answers": [{"start": 0, "end": 3, "text": "Oslo"}],
                }
            ],
        }
    ],
    "rte": [{"premise": "Ann sold it.", "hypothesis": "It was sold.", "idx": 1, "label": "entailment"}],
    "wic": [
        {
            "word": "bank",
            "sentence1": "We sat on the bank.",
            "sentence2": "Banks lend money.",
            "start1": 14,
            "end1": 18,
            "start2": 0,
            "end2": 5,
            "idx": 2,
            "label": False,
        }
    ],
    "wsc": [
        {
            "text": 'Tom thanked Bill. "Keep it," he said.',
            "target": {
                "span1_text": "tom",
                "span1_index": 0,
                "span2_text": "he",
                "span2_index": 6,
            },
            "idx": 6,
            "label": True,
        }
    ],
}

HUB_ROWS: dict[str, list[dict[str, Any]]] = {
    "boolq": [{**FILE_ROWS["boolq"][0], "label": 1}],
    "cb": [{**FILE_ROWS["cb"][0], "label": 2}],
    "copa": FILE_ROWS["copa"],
    "multirc": [
        {
            "paragraph": "Ada fed the goats. Then she slept.",
            "question": question,
            "answer": answer,
            "idx": {"paragraph": 4, "question": question_idx, "answer": answer_idx},
            "label": label,
        }
        for question, question_idx, answer, answer_idx, label in [
            ("Who ate?", 8, "The goats", 20, 1),
            ("Who ate?", 8, "The hens", 21, 0),
            ("Who slept?", 9, "Ada", 22, 1),
        ]
    ],
    "record": [
        {
            "passage": "Oslo beat Bergen.\n@highlight\nOslo won\n@highlight\nBergen lost",
            "query": "Fans of @placeholder sang.",
            "entities": ["Oslo", "Bergen"],
            "entity_spans": {"text": ["Oslo"], "start": [0], "end": [4]},
            "answers": ["Oslo"],
            "idx": {"passage": 5, "query": 11},
        }
    ],
    "rte": [{**FILE_ROWS["rte"][0], "label": 0}],
    "wic": [{**FILE_ROWS["wic"][0], "label": 0}],
    "wsc": [
        {
            "text": 'Tom thanked Bill. "Keep it," he said.',
            "span1_text": "tom",
            "span1_index": 0,
            "span2_text": "he",
            "span2_index": 6,
            "idx": 6,
            "label": 1,
        }
    ],
}

_GOATS = "Ada fed the goats. Then she slept."
_OSLO = "Oslo beat Bergen. Oslo won. Bergen lost"
EXPECTED = {
    "boolq": [Example(7, (("is tin a metal", "Tin is a soft metal."),), 1)],
    "cb": [Example(0, (("I doubt it rained.", "it rained"),), 2)],
    "copa": [
        Example(
            3,
            (
                ("The kettle whistled because", "The water boiled."),
                ("The kettle whistled because", "The cup fell."),
            ),
            (0,),
            meta={"candidates": ("The water boiled.", "The cup fell.")},
        )
    ],
    "multirc": [
        Example(
            {"paragraph": 4, "question": question, "answer": answer},
            ((_GOATS, text),),
            target,
            group=(4, question),
            source=4,
        )
        for question, answer, text, target in [
            (8, 20, "Who ate? The goats", 1),
            (8, 21, "Who ate? The hens", 0),
            (9, 22, "Who slept? Ada", 1),
        ]
    ],
    "record": [
        Example(
            {"passage": 5, "query": 11},
            ((_OSLO, "Fans of Oslo sang."), (_OSLO, "Fans of Bergen sang.")),
            (0,),
            source=5,
            meta={"candidates": ("Oslo", "Bergen"), "answers": ("Oslo",)},
        )
    ],
    "rte": [Example(1, (("Ann sold it.", "It was sold."),), 0)],
    "wic": [Example(2, (("bank: We sat on the * bank *.", "* Banks * lend money."),), 0)],
    "wsc": [Example(6, (('* Tom * thanked Bill. "Keep it," # he # said.', None),), 1)],
}


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_the_official_files(name: str) -> None:
    assert adapt_rows(name, FILE_ROWS[name], the_input(FILE_ROWS[name])) == EXPECTED[name]


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_the_hub(name: str) -> None:
    assert adapt_rows(name, HUB_ROWS[name], the_input(HUB_ROWS[name])) == EXPECTED[name]


def without_labels(name: str) -> list[dict[str, Any]]:
    if name == "multirc":
        return [{**row, "label": -1} for row in HUB_ROWS[name]]
    if name == "record":
        return [{**row, "answers": []} for row in HUB_ROWS[name]]
    return [{k: v for k, v in row.items() if k != "label"} for row in FILE_ROWS[name]]


@pytest.mark.parametrize("name", NAMES)
def test_rows_without_labels_are_read_as_test_rows_only(name: str, write_rows: Any) -> None:
    folder = write_rows(val=without_labels(name), test=without_labels(name))
    task = make_task(TaskConfig(name=name), DataConfig(path=str(folder)))
    test = task.read("test")
    assert [e.rows for e in test] == [e.rows for e in EXPECTED[name]]
    assert all(example.target is None for example in test)
    with pytest.raises(UserError, match="has no label"):
        task.read("validation")


def test_labels_of_a_test_split_are_not_read(write_rows: Any) -> None:
    (passage,) = json.loads(json.dumps(FILE_ROWS["multirc"]))
    for answer in (a for q in passage["passage"]["questions"] for a in q["answers"]):
        answer["label"] = "?"
    for name, row in (("multirc", passage), ("cb", {**FILE_ROWS["cb"][0], "label": "?"})):
        task = make_task(TaskConfig(name=name), DataConfig(path=str(write_rows(test=[row], val=[row]))))
        for read in (lambda task=task: task.read("test"), lambda task=task, row=row: task.parse([row])):
            examples = read()
            assert [e.rows for e in examples] == [e.rows for e in EXPECTED[name]]
            assert {e.target for e in examples} == {None}
        with pytest.raises(UserError, match=r"row 1 of .*: label '\?' is none of"):
            task.read("validation")


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_no_data_set_need_the_tasks_columns_only(name: str) -> None:
    task = make_task(TaskConfig(name=name), DataConfig())
    rows = [{column: row[column] for column in task.columns} for row in HUB_ROWS[name]]
    parsed = task.parse(rows)
    assert [example.rows for example in parsed] == [example.rows for example in EXPECTED[name]]
    assert all(example.target is None for example in parsed)


@pytest.mark.parametrize("name", NAMES)
def test_the_official_files(name: str, superglue: Path) -> None:
    folder, train_count, validation_count = COUNTS[name]
    names = {"train": "train_32.jsonl", "validation": "val_32.jsonl"} if name == "record" else {}
    task = make_task(TaskConfig(name=name), DataConfig(path=str(superglue / folder), **names))
    train, validation = task.read("train"), task.read("validation")
    assert (len(train), len(validation)) == (train_count, validation_count)
    for example in train + validation:
        if task.kind == "classification":
            assert len(example.rows) == 1
            assert example.target in range(task.outputs)
        else:
            assert isinstance(example.target, tuple)
            assert example.target
            assert len(set(example.meta["candidates"])) == len(example.rows) >= 2
    assert task.majority_baseline(train, validation) == pytest.approx(BASELINES[name])


def test_labels_words_and_metrics() -> None:
    tasks = {name: make_task(TaskConfig(name=name), DataConfig()) for name in NAMES}
    assert {name: task.main_metric for name, task in tasks.items()} == {
        **dict.fromkeys(NAMES, "accuracy"),
        **dict.fromkeys(("cb", "multirc", "record"), "average"),
    }
    assert tasks["multirc"].metric_names == ("f1_a", "exact_match", "average")
    assert tasks["record"].metric_names == ("f1", "exact_match", "average")
    assert tasks["cb"].labels == ("entailment", "contradiction", "neutral")
    assert [tasks[name].outputs for name in NAMES] == [2, 3, 1, 2, 1, 2, 2, 2]
    yes_no = ("no", "yes")
    assert {name: task.label_words for name, task in tasks.items()} == {
        "boolq": yes_no,
        "cb": ("entailment", "contradiction", "neutral"),
        "copa": ("cause", "effect"),
        "multirc": yes_no,
        "record": ("entity", "answer"),
        "rte": ("entailment", "not entailment"),
        "wic": ("different", "same"),
        "wsc": yes_no,
    }
    chosen = make_task(TaskConfig(name="cb", metric="f1_macro"), DataConfig())
    assert chosen.main_metric == "f1_macro"


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "rte",
            {"premise": None, "hypothesis": "h"},
            "row 2 of the input: column 'premise' is empty: drop the row",
        ),
        (
            "rte",
            {"premise": float("nan"), "hypothesis": "h"},
            "row 2 of the input: column 'premise' is empty",
        ),
        ("boolq", {"question": "q", "passage": None}, "row 2 of the input: column 'passage' is empty"),
        ("copa", HUB_ROWS["copa"][0] | {"choice2": None}, "column 'choice2' is empty"),
        ("wic", HUB_ROWS["wic"][0] | {"word": None}, "column 'word' is empty"),
        ("multirc", HUB_ROWS["multirc"][0] | {"answer": None}, "column 'answer' is empty"),
        ("multirc", {"idx": 1, "passage": {"text": None, "questions": []}}, "column 'passage.text' is empty"),
        ("record", HUB_ROWS["record"][0] | {"entities": ["a", None]}, "column 'entities.1' is empty"),
        ("rte", {"premise": "p", "label": 0}, r"row 2 of .*'hypothesis'.*has: premise, label"),
        ("copa", {"premise": "p", "choice1": "a"}, "row 2 of the input: this is not a row of task copa"),
        ("cb", {"premise": "p", "hypothesis": "h", "label": "yes"}, "row 2 of the input: label 'yes'"),
        ("boolq", {"question": "q", "passage": "p", "label": 2}, "row 2 of the input: label '2' is none of"),
        (
            "record",
            {**HUB_ROWS["record"][0], "answers": ["Rome"]},
            "row 2 of the input: no entity of the passage is an answer to query 'Fans of @",
        ),
    ],
)
def test_a_wrong_row_is_named(name: str, row: dict[str, Any], message: str) -> None:
    rows = [FILE_ROWS[name][0], row]
    with pytest.raises(UserError, match=message):
        adapt_rows(name, rows, the_input(rows))


_LONG = 40_000


@pytest.mark.parametrize(
    ("name", "row"),
    [
        (
            "multirc",
            {
                "passage": {
                    "text": "a",
                    "questions": [{"question": "q" * _LONG, "answers": [{"text": "a"}] * 200}],
                }
            },
        ),
        ("record", {"passage": "a", "query": "q" * _LONG, "entities": [*map(str, range(200))]}),
        ("record", {"passage": "a", "query": "@placeholder" * 2000, "entities": ["e" * _LONG]}),
        (
            "record",
            {"passage": {"text": "a" * _LONG, "entities": [{"start": 0, "end": _LONG}] * 200}, "qas": []},
        ),
        (
            "record",
            {
                "passage": {"text": "abc", "entities": [{"start": 0, "end": n} for n in range(3)]},
                "qas": [{"idx": 0, "query": "q" * _LONG}] * 50,
            },
        ),
    ],
)
def test_a_row_that_stands_for_too_much_is_refused_before_it_is_made(name: str, row: dict[str, Any]) -> None:
    tracemalloc.start()
    with pytest.raises(UserError, match=r"row 1 of the input: the row stands for \d+ characters"):
        adapt_rows(name, [row], the_input([row]))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 20


def test_a_local_run_imports_nothing_heavy(write_rows: Any) -> None:
    folder = write_rows(train=FILE_ROWS["wic"])
    program = f"""
import sys
from gpc_dist.config import DataConfig, TaskConfig
from gpc_dist.tasks import make_task
make_task(TaskConfig(name="wic"), DataConfig(path={str(folder)!r})).read("train")
heavy = {{"torch", "sklearn", "scipy", "datasets", "transformers", "pyarrow", "pandas"}}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
