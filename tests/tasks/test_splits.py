"""A split in one file or in several: all parts of it, or a refusal that names what is wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from gpc_dist.config import DataConfig, TaskConfig
from gpc_dist.errors import UserError
from gpc_dist.tasks import make_task
from gpc_dist.tasks.read import read_rows


def part(path: Path, *texts: str) -> None:
    """A file of rows, in the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "label": "a"} for text in texts]
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
        return
    if ".csv" in path.name.lower():
        content = "text,label\n" + "".join(f"{row['text']},a\n" for row in rows)
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())


def texts(split: Any, **data: Any) -> list[str]:
    return [row["text"] for row in read_rows(DataConfig(**data), split)[1]]


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00003.parquet", "train-00001-of-00003.parquet", "train-00002-of-00003.parquet"),
        ("data/train-00000-of-00002-6d1f0a2b3c4d5e6f.parquet", "data/train-00001-of-00002-0a1b2c3d4e5f6a7b.parquet"),
        ("train/0000.parquet", "train/0001.parquet"),
        ("data/train/a.jsonl.gz", "data/train/b.jsonl.gz"),
        ("en/train-00000-of-00001.parquet",),
        ("en/train/0000.parquet", "en/train/0001.parquet"),
        ("train.csv.gz",),
        ("train.json.gz",),
        ("data/train.CSV",),
    ],
)  # fmt: skip
def test_all_parts_are_read_in_order(tmp_path: Path, names: tuple[str, ...]) -> None:
    for number, name in enumerate(names):
        part(tmp_path / name, f"{number}a", f"{number}b")
    part(tmp_path / "data" / "validation-00000-of-00001.parquet", "v")
    expected = [f"{number}{letter}" for number in range(len(names)) for letter in "ab"]
    assert texts("train", path=str(tmp_path), config="en") == expected
    assert texts("validation", path=str(tmp_path), config="en") == ["v"]


def test_a_data_set_of_one_configuration_has_the_hubs_name_for_it(tmp_path: Path) -> None:
    part(tmp_path / "default" / "train" / "0000.parquet", "a")
    assert texts("train", path=str(tmp_path)) == ["a"]


def test_a_named_part_stands_for_all_but_predict_takes_the_file_it_is_given(tmp_path: Path) -> None:
    for number in range(3):
        part(tmp_path / f"mine-0000{number}-of-00003.jsonl", str(number))
    first = str(tmp_path / "mine-00000-of-00003.jsonl")
    assert texts("train", path=first) == ["0", "1", "2"]
    assert texts("validation", path=str(tmp_path), validation="mine-00001-of-00003.jsonl") == ["0", "1", "2"]
    assert texts("test", path=str(tmp_path), test="mine-00001-of-00003.jsonl") == ["1"]


def test_a_row_is_named_in_its_own_part(tmp_path: Path) -> None:
    part(tmp_path / "train-00000-of-00002.jsonl", "a", "b")
    (tmp_path / "train-00001-of-00002.jsonl").write_text('{"text": "c", "label": "b"}\n{"label": "a"}\n')
    task = make_task(TaskConfig(text=["text"]), DataConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match=r"row 2 of .*train-00001-of-00002.jsonl: there is no column 'text'"):
        task.read("train")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"],
            r"train-\*-of-00003.jsonl has 3 parts, counted from 0, and here are 0, 2: fetch those that are missing",
        ),
        (
            ["train-00000-of-00001-aaaa.jsonl", "train-00000-of-00001-bbbb.jsonl"],
            r"has 1 parts, counted from 0, and here are 0, 0: .* keep each once",
        ),
        (
            ["train-00000-of-00001.jsonl", "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
            r"several train files \(train-\*-of-00001.jsonl, train-\*-of-00002.jsonl\)",
        ),
        (
            ["train.jsonl", "data/train-00000-of-00001.jsonl"],
            r"several train files \(train.jsonl, data/train-\*-of-00001.jsonl\)",
        ),
        (["train.jsonl", "train.jsonl.gz"], r"several train files \(train.jsonl, train.jsonl.gz\)"),
        (["train.jsonl", "train/a.jsonl"], r"several train files \(train/, train.jsonl\)"),
        (["train/a.csv", "train/a.jsonl"], r"train holds files of several formats \(a.csv, a.jsonl\)"),
        (["train/x-00001-of-00002.jsonl"], r"x-\*-of-00002.jsonl has 2 parts, .* here are 1"),
        (["train.txt", "training.jsonl"], r"no train file in .* it holds train.txt, training.jsonl\)"),
    ],
)
def test_what_is_missing_or_double_is_named(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        part(tmp_path / name, "a")
    with pytest.raises(UserError, match=message):
        read_rows(DataConfig(path=str(tmp_path)), "train")


@pytest.mark.parametrize(
    "content",
    [b"no gzip at all", gzip.compress(b"text\n" + b"a\n" * 50)[:-12]],
    ids=["no gzip", "its end is missing"],
)
def test_a_damaged_gzip_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.csv.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"train.csv.gz is not a whole gzip file .*: fetch it again"):
        read_rows(DataConfig(path=str(tmp_path)), "train")
