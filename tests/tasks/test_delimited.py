"""CSV and TSV: every row with the text that was written, or a refusal that names the line."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from gpc_dist.config import DataConfig
from gpc_dist.errors import UserError
from gpc_dist.tasks.formats import read_file
from gpc_dist.tasks.read import read_rows

LONE = 'text,label\ngood,pos\n"bad start,neg\nfine text,pos\nsaid "well,neg\nlast,pos\n'
TEXTS = [
    "plain",
    'He said "no"',
    '"Quote" at the start',
    "a\ttab, a comma",
    "two\nlines",
    "",
    " blanks ",
    "NA",
]


def read(folder: Path, name: str, content: str, quoting: Any = "auto") -> list[list[str]]:
    (folder / name).write_text(content, encoding="utf-8", newline="")
    return [list(row.values()) for row in read_file(folder / name, quoting)]


def written(delimiter: str, quoting: Any, terminator: str = "\n") -> str:
    """What a writer that quotes makes of `TEXTS`."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=terminator)
    writer.writerows([["text", "label"], *([text, "0"] for text in TEXTS)])
    return file.getvalue()


@pytest.mark.parametrize("terminator", ["\n", "\r\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("t.tsv", "\t")])
def test_what_a_writer_quoted_is_read_back(
    tmp_path: Path, name: str, delimiter: str, quoting: Any, terminator: str
) -> None:
    for asked in ("auto", "quoted"):
        rows = read(tmp_path, name, written(delimiter, quoting, terminator), asked)
        assert rows == [[text, "0"] for text in TEXTS]


def test_pandas_tables_are_read_back(tmp_path: Path) -> None:
    import pandas as pd

    table = pd.DataFrame({"text": TEXTS[:5], "label": ["0", "1", "0", "1", "1"]})
    for name, separator in (("t.tsv", "\t"), ("t.csv", ",")):
        table.to_csv(tmp_path / name, sep=separator)  # with its index, a column without a name
        assert read_file(tmp_path / name) == table.to_dict("records")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LONE, r"lines 3 to 5 of .*t.csv: a quoted field does not end as it must .* data.quoting none"),
        ('text,label\ngood,pos\n"never closed,neg\nfine,pos\n', r"lines 3 to 4 of .*unexpected end of data"),
        ('text,label\n"bad" start,neg\nfine,pos\n', r"line 2 of .*: a quoted field does not end"),
        ('text,label\n"a \\"b\\" c",neg\n', r"line 2 of .*: a quoted field does not end"),
        # two lone quotes that make one row without breaking any rule
        (
            'text,label\nok,pos\n"bad,neg\nfine,pos\nso well",neg\nlast,neg\n',
            r"lines 3 to 5 of .* are one row, .* each could be a row of its own: .* data.quoting",
        ),
        ('label,text\npos,ok\nneg,"bad\npos,fine\nneg,well"\nneg,x\n', r"lines 3 to 5 of .* are one row"),
        ('text,label\nok,pos\nx,neg\na,"pos\nb,neg"\n', r"lines 4 to 5 of .* are one row"),
        ("text,text,label\na,b,neg\n", r"t.csv has more than one column 'text': rename"),
        ("text, text,label\na,b,neg\n", r"t.csv has more than one column 'text': rename"),
        ('text,label\na,b,c\n', "line 2 of .* has 3 fields, its header has 2: text, label"),
        ('text,label\n"a\nb",pos\na\n', "line 4 of .* has 1 fields, its header has 2"),
    ],
)  # fmt: skip
def test_no_row_of_a_csv_vanishes(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, "t.csv", content)


def test_quotes_are_what_the_user_says(tmp_path: Path) -> None:
    rows = read(tmp_path, "t.csv", LONE, "none")
    assert [row[0] for row in rows] == ["good", '"bad start', "fine text", 'said "well', "last"]
    closed = 'text,label\nok,neg\n"bad,neg\nwell",neg\n'
    assert read(tmp_path, "t.csv", closed, "quoted") == [["ok", "neg"], ["bad,neg\nwell", "neg"]]
    (tmp_path / "train.csv").write_text(LONE)
    assert len(read_rows(DataConfig(path=str(tmp_path), quoting="none"), "train")[1]) == 5


def test_letters_with_commas_at_line_ends_are_no_rows(tmp_path: Path) -> None:
    letter = "Dear all,\nplease, come\nYours"
    assert read(tmp_path, "t.csv", f'text,label\nno,neg\n"{letter}",pos\n"Hi,\nyes",pos\n') == [
        ["no", "neg"],
        [letter, "pos"],
        ["Hi,\nyes", "pos"],
    ]


def test_long_fields_are_read(tmp_path: Path) -> None:
    long = "x, " * 1_000_000
    assert read(tmp_path, "t.csv", f'text,label\n"{long}",neg\nfine,pos\n') == [
        [long, "neg"],
        ["fine", "pos"],
    ]


def test_empty_names_and_lines_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text , label,,\n\na,b,,\n\n")
    assert read_file(tmp_path / "t.csv") == [{"text": "a", "label": "b"}]


def test_doubled_quotes_tell_that_a_tsv_file_quotes(tmp_path: Path) -> None:
    content = 'text\tlabel\n"a\tb ""c""\nd"\t1\n"""e"""\t0\n'  # each line has two fields without quoting, too
    assert read(tmp_path, "t.tsv", content) == [['a\tb "c"\nd', "1"], ['"e"', "0"]]


@pytest.mark.parametrize(
    "texts",
    [
        ['"lone', "fine", 'so "well', "last"],
        ['"Go," he said', "fine"],
        ['"lone', "fine"],
        ['a "b" c', '2" pipe"'],
        ['"" is empty', '""x'],
    ],
)
def test_quotes_in_a_tsv_file_are_text_where_they_cannot_stand_around_fields(
    tmp_path: Path, texts: list[str]
) -> None:
    lines = "".join(f"{text}\t{number % 2}\n" for number, text in enumerate(texts))
    assert [row[0] for row in read(tmp_path, "t.tsv", f"text\tlabel\n{lines}")] == texts


@pytest.mark.parametrize(
    ("content", "line", "quoted", "plain"),
    [
        ('"Fine"\t1\nbad\t0\n', 2, ["Fine", "bad"], ['"Fine"', "bad"]),
        ('ok\t1\n"bad\t0\nso well"\t0\n', 3, ["ok", "bad\t0\nso well"], ["ok", '"bad', 'so well"']),
    ],
)
def test_a_tsv_file_that_can_be_read_in_two_ways_is_asked_about(
    tmp_path: Path, content: str, line: int, quoted: list[str], plain: list[str]
) -> None:
    content = f"text\tlabel\n{content}"
    with pytest.raises(UserError, match=rf"the quotes in line {line} of .*t.tsv may .* set data.quoting"):
        read(tmp_path, "t.tsv", content)
    assert [row[0] for row in read(tmp_path, "t.tsv", content, "quoted")] == quoted
    assert [row[0] for row in read(tmp_path, "t.tsv", content, "none")] == plain


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text\tlabel\na\tb\tc\n', r"line 2 of .* has 3 fields"),
        ('text\tlabel\n"a\tb"\tc\n"d\te\n', r"line 2 of .* has 3 fields.*; and with quotes .*, line 3 of"),
        ('"text"\t"label"\n"a "b""\t"c"\n', r"line 2 of .*: a quoted field does not end"),
        ('text\ttext\na\tb\n', "more than one column 'text'"),
    ],
)  # fmt: skip
def test_a_malformed_tsv_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, "t.tsv", content)
