"""Rows of CSV and TSV files. Every value is the text that stands in the file: no type is guessed.

The standard library's reader in strict mode refuses what pyarrow's and pandas' readers take: a quoted field that goes
on after its closing quote. It is how a lone quote at the start of a text shows after it has swallowed other rows.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gpc_dist.errors import UserError

Quoting = Literal["auto", "quoted", "none"]

DELIMITERS = {".csv": ",", ".tsv": "\t"}

csv.field_size_limit(sys.maxsize)  # of the process; the default of 128 KiB is less than a long document


@dataclass(frozen=True)
class _Record:
    """A row, and the lines that it takes, counted from 1."""

    first: int
    last: int
    fields: list[str]


@dataclass(frozen=True)
class _Grid:
    """A file's rows as one way of reading gives them."""

    header: list[str]
    records: list[_Record]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """As dictionaries, without the columns that have no name."""
        return [
            {name: value for name, value in zip(self.header, record.fields, strict=True) if name}
            for record in self.records
        ]


_Splitter = Callable[[str, str, str], Iterator[_Record]]
"""Takes the text, its source (for messages) and the delimiter."""


def read_delimited(text: str, source: str, delimiter: str, quoting: Quoting) -> list[dict[str, Any]]:
    """The rows of a CSV or TSV file.

    Args:
        text: of the file, with its line ends as they are.
        source: name of the file, for messages.
        quoting: `quoted`: quotes stand around fields; `none`: a quote is an ordinary character; `auto`: as `quoted`
            in a CSV file, where the rows tell in a TSV file.

    Raises:
        UserError: a malformed row, a repeated column name, or with `auto` quotes whose meaning is not certain.
    """
    if quoting == "none" or '"' not in text:
        return _read(_split_unquoted, text, source, delimiter).rows
    if quoting == "auto" and delimiter == "\t":
        return _read_either(text, source, delimiter).rows
    grid = _read(_split_quoted, text, source, delimiter)
    if quoting == "auto":
        _refuse_swallowed(grid, text, source, delimiter)
    return grid.rows


def _read(split: _Splitter, text: str, source: str, delimiter: str) -> _Grid:
    records = (record for record in split(text, source, delimiter) if record.fields)  # no empty lines
    first = next(records, _Record(1, 1, []))
    header = [name.strip() for name in first.fields]
    refuse_repeated([name for name in header if name], source)
    found = []
    for record in records:
        if len(record.fields) != len(header):
            raise UserError(
                f"line {record.first} of {source} has {len(record.fields)} fields, its header has {len(header)}: "
                f"{', '.join(header)}"
            )
        found.append(record)
    return _Grid(header, found)


def refuse_repeated(names: Sequence[str], source: str) -> None:
    """Raise `UserError` if a name occurs twice among those of a table's columns."""
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{source} has more than one column '{', '.join(repeated)}': rename or remove one")


def _split_unquoted(text: str, source: str, delimiter: str) -> Iterator[_Record]:
    for number, line in enumerate(_lines(text), start=1):
        yield _Record(number, number, _split_line(line, delimiter))


def _split_quoted(text: str, source: str, delimiter: str) -> Iterator[_Record]:
    reader = csv.reader(_lines(text), delimiter=delimiter, strict=True)
    first = 1
    try:
        for fields in reader:
            yield _Record(first, reader.line_num, fields)
            first = reader.line_num + 1
    except csv.Error as error:
        where = f"line {first}" if reader.line_num <= first else f"lines {first} to {reader.line_num}"
        raise UserError(
            f"{where} of {source}: a quoted field does not end as it must ({error}): write a quote inside it twice, "
            "or set data.quoting none if quotes are ordinary characters"
        ) from None


def _lines(text: str) -> Iterator[str]:
    return iter(io.StringIO(text, newline=""))


def _split_line(line: str, delimiter: str) -> list[str]:
    bare = line.rstrip("\r\n")
    return bare.split(delimiter) if bare else []


def _read_either(text: str, source: str, delimiter: str) -> _Grid:
    """Tell apart a file in which quotes are ordinary characters, such as GLUE's, and one that quotes its fields.

    Raises:
        UserError: both are possible and differ, or neither is.
    """

    def attempt(split: _Splitter) -> tuple[_Grid | None, str]:
        try:
            return _read(split, text, source, delimiter), ""
        except UserError as error:
            return None, str(error)

    plain, not_plain = attempt(_split_unquoted)
    quoted, not_quoted = attempt(_split_quoted)
    if quoted is None:
        if plain is None:
            raise UserError(f"{not_plain}; and with quotes around fields, {not_quoted}")
        if _in_quotes(plain.header):  # whoever quotes these quotes all fields
            raise UserError(not_quoted)
        return plain
    if plain is None or plain.header != quoted.header:
        return quoted
    lines = list(_lines(text))
    for record in quoted.records:
        if record.first == record.last:
            raw = _split_line(lines[record.first - 1], delimiter)
            in_quotes = [value for value, field in zip(record.fields, raw, strict=True) if value != field]
        else:
            in_quotes = [value for value in record.fields if "\n" in value or "\r" in value]
        # a quote in a quoted field is written twice; a text has none but doubled ones by no chance
        if not all('"' in value for value in in_quotes):
            raise UserError(
                f"the quotes in line {record.first} of {source} may stand around a field or belong to its text: "
                "set data.quoting to quoted or to none"
            )
    return quoted


def _in_quotes(header: Sequence[str]) -> bool:
    return any(len(name) > 1 and name[0] == name[-1] == '"' for name in header)


def _refuse_swallowed(grid: _Grid, text: str, source: str, delimiter: str) -> None:
    """Refuse a field over several lines each of which looks like a row of its own: two lone quotes make one of several.

    A line looks so if it has the header's number of fields and, like the other lines, a value in some column that
    other rows have there too, as labels are.
    """
    long = [record for record in grid.records if record.last > record.first]
    if not long or len(grid.header) < 2:
        return
    lines = list(_lines(text))
    short = [record.fields for record in grid.records if record.last == record.first]
    known = [{fields[column].strip() for fields in short} - {""} for column in range(len(grid.header))]
    for record in long:
        parts = [_split_line(line, delimiter) for line in lines[record.first - 1 : record.last]]
        if any(len(fields) != len(grid.header) for fields in parts):
            continue
        columns = [[fields[column].strip(' "') for fields in parts] for column in range(len(grid.header))]
        if any(values.issuperset(column) for values, column in zip(known, columns, strict=True)):
            raise UserError(
                f"lines {record.first} to {record.last} of {source} are one row, because a quote opens in the first "
                "and closes in the last, but each could be a row of its own: correct the quotes, or set data.quoting "
                "to none (they are ordinary characters) or quoted (they are right)"
            )
