"""Tables: what is read is what another reader finds, and nothing that stands in the file is lost."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpc_dist.config import DataConfig, TaskConfig
from gpc_dist.errors import UserError
from gpc_dist.tasks import Example, make_task
from gpc_dist.tasks.formats import read_file
from tests.fuzz.conftest import FUZZ, judged
from tests.fuzz.mutations import changed_bytes, changed_tree, trees

TABLE = [
    {"text": "fine", "label": "pos"},
    {"text": 'said "well"', "label": "neg"},
    {"text": "two\nlines, a comma and a\ttab", "label": "pos"},
    {"text": "é 😀", "label": "neg"},
]


def delimited(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["text", "label"], delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


LINES = "".join(json.dumps(row) + "\n" for row in TABLE).encode()
FILES = {
    "t.csv": delimited(TABLE),
    "t.tsv": delimited(TABLE, "\t"),
    "t.jsonl": LINES,
    "t.json": json.dumps(TABLE).encode(),
    "t.parquet": parquet(TABLE),
    "t.csv.gz": gzip.compress(delimited(TABLE), mtime=0),
    "t.jsonl.gz": gzip.compress(LINES, mtime=0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


def put(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", FILES)
def test_a_whole_file_is_read(folder: Path, name: str) -> None:
    assert read_file(put(folder, name, FILES[name])) == TABLE


cell = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"), max_size=12)


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("t.tsv", "\t")])
@FUZZ
@given(rows=st.lists(st.fixed_dictionaries({"text": cell, "label": cell}), min_size=1, max_size=5))
def test_what_a_csv_writer_writes_is_read(
    folder: Path, name: str, delimiter: str, rows: list[dict[str, str]]
) -> None:
    found = judged(lambda: read_file(put(folder, name, delimited(rows, delimiter)), "quoted"))
    assert found == rows


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
@FUZZ
@given(data=st.data())
def test_no_character_of_a_damaged_table_is_lost(folder: Path, name: str, data: st.DataObject) -> None:
    content = data.draw(changed_bytes(FILES[name]))
    found = judged(lambda: read_file(put(folder, name, content)))
    if isinstance(found, UserError) or not found:
        return
    text = content.decode("utf-8-sig")
    header, _, _ = text.partition("\n")
    if len(found[0]) < 2:  # a column without a name is left out
        return
    shown = "".join([*found[0], *(value for row in found for value in row.values())])
    assert letters(shown) == letters(text), header


def letters(text: str) -> Counter[str]:
    return Counter(character for character in text if character.isalnum())


@FUZZ
@given(data=st.data())
def test_json_lines_are_those_of_the_json_module(folder: Path, data: st.DataObject) -> None:
    content = data.draw(changed_bytes(LINES))
    found = judged(lambda: read_file(put(folder, "t.jsonl", content)))
    if not isinstance(found, UserError):
        lines = content.decode("utf-8-sig").split("\n")
        assert found == [json.loads(line) for line in lines if line.strip()]


@pytest.mark.parametrize("name", FILES)
@FUZZ
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(folder: Path, name: str, data: st.DataObject) -> None:
    content = data.draw(changed_bytes(FILES[name]))
    found = judged(lambda: read_file(put(folder, name, content)))
    if isinstance(found, UserError):
        assert name in str(found)
    elif name.endswith(".gz"):
        assert found == TABLE, "gzip has a checksum"


DESCRIBED = {
    "a text and a label": TaskConfig(name="t", text=["text"], label="label"),
    "a template": TaskConfig(name="t", text=["Is it {text}?"], label="label", labels=["pos", "neg"]),
    "a number": TaskConfig(name="t", text=["text"], label="label", kind="regression"),
    "choices": TaskConfig(name="t", kind="choice", text=["text"], choices=["label", "text"], label="label"),
}


@pytest.mark.parametrize("kind", DESCRIBED)
@FUZZ
@given(data=st.data())
def test_rows_of_any_values_make_examples_or_one_line(folder: Path, kind: str, data: st.DataObject) -> None:
    rows = data.draw(changed_tree(TABLE, 3))
    path = put(folder, "t.json", json.dumps(rows).encode())

    def examples() -> list[Any]:
        config = DataConfig(path=str(path))
        return make_task(DESCRIBED[kind], config).read("train")

    found = judged(examples)
    if not isinstance(found, UserError):
        assert len(found) == len(rows)


DIAGNOSTICS = ["axb", "axg"]
PACKAGED = ["boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc", "sst2", "cola", *DIAGNOSTICS]


def read(name: str, path: Path) -> list[Example]:
    """The examples of a packaged task in a file with labels."""
    task = make_task(TaskConfig(name=name), DataConfig(path=str(path), validation=path.name))
    return task.read("validation" if name in DIAGNOSTICS else "train")


@pytest.mark.parametrize("name", PACKAGED)
@FUZZ
@given(data=st.data())
def test_rows_of_packaged_tasks_make_examples_or_one_line(
    folder: Path, name: str, data: st.DataObject
) -> None:
    row = data.draw(st.dictionaries(st.sampled_from(sorted(KEYS)), trees, max_size=8))
    row = {**GOOD.get(name, {}), **row}
    path = put(folder, "t.jsonl", json.dumps(row).encode())
    found = judged(lambda: read(name, path))
    assert isinstance(found, UserError | list)


GOOD: dict[str, dict[str, Any]] = {
    "boolq": {"question": "is it", "passage": "It is.", "idx": 0, "label": True},
    "cb": {"premise": "It is.", "hypothesis": "It is not.", "idx": 0, "label": "neutral"},
    "copa": {"premise": "a", "choice1": "b", "choice2": "c", "question": "cause", "idx": 0, "label": 1},
    "multirc": {
        "idx": 0,
        "passage": {
            "text": "A text.",
            "questions": [
                {"question": "q", "idx": 0, "answers": [{"text": "a", "idx": 0, "label": 1}]},
            ],
        },
    },
    "record": {
        "idx": 0,
        "passage": {"text": "Ada met Bob.", "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}]},
        "qas": [
            {"idx": 0, "query": "@placeholder met", "answers": [{"start": 0, "end": 2, "text": "Ada"}]},
        ],
    },
    "rte": {"premise": "It is.", "hypothesis": "It is not.", "idx": 0, "label": "entailment"},
    "wic": {
        "word": "bed",
        "sentence1": "a bed",
        "sentence2": "the bed",
        "idx": 0,
        "label": True,
        "start1": 2,
        "end1": 5,
        "start2": 4,
        "end2": 7,
        "version": 1.1,
    },
    "wsc": {
        "text": "Ada met Bob and he left",
        "target": {"span1_index": 2, "span1_text": "Bob", "span2_index": 4, "span2_text": "he"},
        "idx": 0,
        "label": True,
    },
    "sst2": {"sentence": "fine", "label": 1, "idx": 0},
    "cola": {"sentence": "fine", "label": 1, "idx": 0},
    "axb": {"sentence1": "It is.", "sentence2": "It is not.", "idx": 0, "label": "not_entailment"},
    "axg": {"premise": "It is.", "hypothesis": "It is not.", "idx": 0, "label": "not_entailment"},
}
KEYS = {key for row in GOOD.values() for key in row}


@pytest.mark.parametrize("name", PACKAGED)
def test_a_good_row_of_a_packaged_task_makes_examples(folder: Path, name: str) -> None:
    path = put(folder, "t.jsonl", json.dumps(GOOD[name]).encode())
    assert read(name, path)
