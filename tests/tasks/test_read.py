"""Finding and reading a split, and what is said when that fails."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from gpc_dist.config import DataConfig
from gpc_dist.errors import UserError
from gpc_dist.tasks.example import Example, limit
from gpc_dist.tasks.formats import read_file
from gpc_dist.tasks.read import read_rows

ROWS = [{"text": "sun, and rain", "label": "b"}, {"text": '"Fog" and an open " quote', "label": "a"}]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    if path.suffix in (".jsonl", ".json"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        quoted = ([row["text"].replace('"', '""'), row["label"]] for row in rows)
        path.write_text("text,label\n" + "".join(f'"{t}",{label}\n' for t, label in quoted))
    else:
        path.write_text("text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in rows))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    assert read_file(write(tmp_path / f"t.{suffix}")) == ROWS


@pytest.mark.parametrize(
    ("split", "name"),
    [
        ("train", "train.csv"),
        ("validation", "validation.jsonl"),
        ("validation", "val.json"),
        ("validation", "valid.tsv"),
        ("validation", "dev.jsonl"),
        ("test", "test.jsonl"),
    ],
)
def test_splits_are_found_by_their_usual_names(tmp_path: Path, split: Any, name: str) -> None:
    write(tmp_path / name)
    source, rows = read_rows(DataConfig(path=str(tmp_path)), split)
    assert (str(source), rows) == (str(tmp_path / name), ROWS)


def test_named_files_are_found_in_the_folder_and_anywhere(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "mine.jsonl")
    elsewhere = write(tmp_path / "other.jsonl", ROWS[:1])
    data = DataConfig(
        path=str(tmp_path / "data"), train="mine.jsonl", validation=str(elsewhere), test="no.csv"
    )
    assert read_rows(data, "train")[1] == ROWS
    assert read_rows(data, "validation")[1] == ROWS[:1]
    assert read_rows(DataConfig(test=str(elsewhere)), "test")[1] == ROWS[:1]
    with pytest.raises(UserError, match=r"data.test 'no.csv' does not exist \(looked at .*data/no"):
        read_rows(data, "test")


def test_a_single_file_is_the_training_split(tmp_path: Path) -> None:
    data = DataConfig(path=str(write(tmp_path / "all.csv")))
    assert read_rows(data, "train")[1] == ROWS
    with pytest.raises(UserError, match=r"set data.validation to the validation file"):
        read_rows(data, "validation")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", '{"a": 1}\n{"a": \n', "line 2 of .*train.jsonl is not valid JSON"),
        ("train.jsonl", '{"a": 1}\n\n[1]\n', "line 3 of .* is not a JSON object"),
        ("train.jsonl", "\n", "has no rows: the train split needs at least one"),
        ("train.csv", "text,label\n", "has no rows"),
        ("train.csv", "", "has no rows"),
        (
            "train.csv",
            "text,label\na,b,c\n",
            "line 2 of .* has 3 fields, its header has 2: text, l",
        ),
        ("train.parquet", "nothing of the kind", "is not a Parquet file"),
        ("train.csv", b"text\na\n\xff\xfe\n", "line 3 of .*train.csv is not UTF-8 text"),
        (
            "train.jsonl",
            '{"a": 1}\n{"a": 1, "b": {"c": 1, "c": 2}}\n',
            "line 2 of .*train.jsonl: duplicate key 'c': keep one of them",
        ),
        (
            "train.json",
            '[{"a": 1},\n{"a": }]',
            "train.json is not valid JSON: Expecting value: line 2 column 7",
        ),
        # a tokenizer cannot take it, nor could any file hold it
        ("train.jsonl", r'{"a": "\ud800"}', "line 1 of .*train.jsonl: it holds one half of a character"),
        ("train.json", '[{"a": 1}, 2]', "element 2 of .*train.json is not a JSON object"),
    ],
)
def test_bad_content_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_rows(DataConfig(path=str(tmp_path)), "train")


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\na,b\n", encoding="utf-8-sig")
    assert read_file(tmp_path / "t.csv") == [{"text": "a", "label": "b"}]


def test_a_json_file_may_be_one_array(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(ROWS, indent=2))
    assert read_file(tmp_path / "t.json") == ROWS


def test_a_repeated_column_of_a_parquet_file_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t.parquet has more than one column 'text': rename"):
        read_file(tmp_path / "t.parquet")


def test_a_parquet_column_that_cannot_be_read_is_no_matter_until_it_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    days = pa.array([10_000_000], pa.int32()).cast(pa.date32())  # a year after 9999
    folder = tmp_path / "day=1"  # no column
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a"], "when": days}), folder / "t.parquet")
    assert read_file(folder / "t.parquet") == [{"text": "a"}]
    assert "column 'when' of" in caplog.text


def test_what_cannot_be_found_is_named_with_what_there_is(tmp_path: Path) -> None:
    write(tmp_path / "notes.csv")
    with pytest.raises(UserError, match=r"no train file in .* it holds notes.csv\): set data.train"):
        read_rows(DataConfig(path=str(tmp_path)), "train")
    write(tmp_path / "train.csv")
    write(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r"several train files \(train.csv, train.jsonl\)"):
        read_rows(DataConfig(path=str(tmp_path)), "train")
    with pytest.raises(UserError, match="does not exist: give a folder, a file or a Hub id"):
        read_rows(DataConfig(path=str(tmp_path / "nowhere")), "train")
    with pytest.raises(UserError, match=r"no data: set data.path"):
        read_rows(DataConfig(), "train")
    with pytest.raises(UserError, match=r"its name must end in .jsonl, .json, .csv"):
        read_file(tmp_path / "train.xlsx")


def test_the_demo_data_come_along() -> None:
    train, validation = (read_rows(DataConfig(path="demo"), split)[1] for split in ("train", "validation"))
    assert (len(train), len(validation)) == (1130, 626)
    for rows in (train, validation):
        assert all(set(row) == {"source", "text", "label"} and row["text"] for row in rows)
        counts = Counter(row["label"] for row in rows)
        assert set(counts) == {"account", "billing", "delivery", "fault"}
        assert max(counts.values()) < 0.3 * len(rows)
    # whole sources, so that nothing of one split is in the other
    assert not {row["source"] for row in train} & {row["source"] for row in validation}
    texts = Counter(row["text"] for row in (*train, *validation))
    assert max(texts.values()) == 1


class FakeTable(list[dict[str, Any]]):
    features: dict[str, Any]


class FakeLabel:
    names = ("no", "yes")


def test_the_hub_is_asked_for_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> FakeTable:
        asked.append((name, config, split))
        table = FakeTable([{"text": "x", "label": 1}, {"text": "y", "label": -1}])
        table.features = {"text": object(), "label": FakeLabel()}
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source, rows = read_rows(DataConfig(path="super_glue"), "validation", hub_config="rte")
    assert str(source) == "super_glue (validation)"
    assert rows == [{"text": "x", "label": "yes"}, {"text": "y", "label": None}]
    read_rows(DataConfig(path="a/b", config="c", train="train[:5]"), "train", hub_config="rte")
    assert asked == [("super_glue", "rte", "validation"), ("a/b", "c", "train[:5]")]


def test_a_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("cannot reach the Hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        read_rows(DataConfig(path="dta/rte"), "train")
    assert str(caught.value) == (
        "data.path 'dta/rte' is no local file or folder, and split 'train' of it could not be "
        "taken from the Hugging Face Hub: cannot reach the Hub"
    )


def test_a_downloaded_file_has_the_class_names_that_the_hub_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    features = datasets.Features(
        {"label": datasets.ClassLabel(names=["a", "b"]), "n": datasets.Value("int32")}
    )
    table = datasets.Dataset.from_dict({"label": [1, None, -1], "n": [1, 0, 2]}, features)
    table.to_parquet(tmp_path / "train.parquet")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    rows = [{"label": "b", "n": 1}, {"label": None, "n": 0}, {"label": None, "n": 2}]
    assert read_rows(DataConfig(path="some/table"), "train")[1] == rows
    assert read_rows(DataConfig(path=str(tmp_path)), "train")[1] == rows


def test_limit_draws_training_examples_and_takes_the_first_others() -> None:
    examples = [Example(n, (("x", None),)) for n in range(100)]
    drawn = [e.id for e in limit(examples, 10, seed=1)]
    assert len(set(drawn)) == 10
    assert drawn == sorted(drawn)
    assert drawn != list(range(10))
    assert drawn == [e.id for e in limit(examples, 10, seed=1)]
    assert drawn != [e.id for e in limit(examples, 10, seed=2)]
    assert [e.id for e in limit(examples, 3)] == [0, 1, 2]
    assert limit(examples, None, seed=1) == limit(examples, 500) == examples


def test_what_holds_a_hundred_times_its_own_size_is_refused(tmp_path: Path) -> None:
    packed, columns = tmp_path / "train.csv.gz", tmp_path / "train.parquet"
    packed.write_bytes(gzip.compress(b"text\n" + b"a\n" * 2**25))
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.nulls(2**25)}), columns)
    for path in (packed, columns):
        assert path.stat().st_size < 2**18
        with pytest.raises(UserError, match=f"{path.name} holds more than 100 times its own size"):
            read_file(path)
