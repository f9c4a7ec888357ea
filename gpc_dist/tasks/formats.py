"""Rows of one file, whatever its format. pyarrow is imported on use."""

from __future__ import annotations

import gzip
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpc_dist.errors import UserError
from gpc_dist.parsing import parse_json
from gpc_dist.tasks.delimited import DELIMITERS, Quoting, read_delimited, refuse_repeated
from gpc_dist.typed import check_as

Row = dict[str, Any]

_TEXT = (".jsonl", ".json", *DELIMITERS)
SUFFIXES = (*_TEXT, ".parquet", *(f"{suffix}.gz" for suffix in _TEXT))
"""Endings of the names of files that can be read."""

_SMALL_BYTES = 16 * 2**20
_MOST_PACKED = 100
"""A file may hold as many times its own size, beyond a small one; text is packed to a tenth at best, and a bomb to a
thousandth or less."""
_TOO_MUCH = f"holds more than {_MOST_PACKED} times its own size"

log = logging.getLogger(__name__)


def suffix_of(path: Path) -> str:
    """The ending that says how a file is read, such as `.csv` or `.csv.gz`; empty if it is none of `SUFFIXES`."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def read_file(path: Path, quoting: Quoting = "auto") -> list[Row]:
    """The rows of a file whose name ends in one of `SUFFIXES`; `.json` is JSON Lines, or one array of objects.

    Args:
        quoting: of CSV and TSV, as `data.quoting`.

    Raises:
        UserError: another kind of file, malformed content, or a file that cannot be read.
    """
    suffix = suffix_of(path)
    if not suffix:
        raise UserError(f"cannot read {path}: its name must end in {', '.join(SUFFIXES)}")
    try:
        if suffix == ".parquet":
            return _read_parquet(path)
        text = _read_text(path, packed=suffix.endswith(".gz"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or _first_line(error)}") from None
    kind = suffix.removesuffix(".gz")
    if kind in DELIMITERS:
        return read_delimited(text, str(path), DELIMITERS[kind], quoting)
    if kind == ".json" and text.lstrip().startswith("["):
        return _parse_json_array(text, str(path))
    return _parse_json_lines(text, str(path))


def _read_text(path: Path, packed: bool) -> str:
    data = _unpacked(path) if packed else path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"line {line} of {path} is not UTF-8 text ({error.reason}): convert it first"
        ) from None


def _unpacked(path: Path) -> bytes:
    most = _SMALL_BYTES + _MOST_PACKED * path.stat().st_size
    try:
        with gzip.open(path) as file:
            data = file.read(most + 1)
        if not data and not path.stat().st_size:
            raise EOFError("it is empty")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}): fetch it again") from None
    if len(data) > most:
        raise UserError(f"{path} {_TOO_MUCH}: unpack it first, if it is to be so")
    return data


def _parse_json_array(text: str, source: str) -> list[Row]:
    rows: list[Row] = parse_json(text, source)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(
                f"element {number} of {source} is not a JSON object: write one object for each row"
            )
    return rows


def _parse_json_lines(text: str, source: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"line {number} of {source}"
        try:
            row = parse_json(line, place)
        except UserError as error:
            raise UserError(f"{error}; each line must be one JSON object") from None
        if not isinstance(row, dict):
            raise UserError(f"{place} is not a JSON object: write one object per line")
        rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        # not `read_table`, which makes columns of folders that are named `key=value`
        file = pyarrow.parquet.ParquetFile(path)
        cells = file.metadata.num_rows * max(1, file.metadata.num_columns)
        if cells > _SMALL_BYTES + _MOST_PACKED * path.stat().st_size:
            raise UserError(f"{path} {_TOO_MUCH}: write it as CSV or JSON Lines, if it is to be so")
        table = file.read()
        refuse_repeated(table.column_names, str(path))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a Parquet file: {_first_line(error)}") from None
    columns = {}
    for name in table.column_names:
        try:
            columns[name] = table[name].to_pylist()
        except (ValueError, OverflowError, pyarrow.ArrowException) as error:
            # a date out of Python's range, for example: no reason to refuse the columns that are asked for
            log.warning(
                "column '%s' of %s cannot be read and is left out: %s", name, path, _first_line(error)
            )
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    names = _class_names(table.schema.metadata or {}, f"{path} (its metadata of datasets)")
    return name_classes(rows, {column: names[column] for column in columns if column in names})


@dataclass(frozen=True)
class _Info:
    features: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Described:
    """What `datasets` writes into a file's metadata."""

    info: _Info = _Info()


def _class_names(metadata: Mapping[bytes, bytes], source: str) -> dict[str, list[str]]:
    """Names of the classes by column, where `datasets` wrote the file and with it that a column holds their numbers."""
    described = parse_json(metadata.get(b"huggingface", b"{}"), source)
    features = check_as(_Described, described, source).info.features or {}
    found: dict[str, list[str]] = {}
    for column, feature in features.items():
        if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
            continue
        names = feature.get("names")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{source} does not name the classes of column '{column}': write the file again")
        found[column] = names
    return found


def name_classes(rows: list[Row], names: Mapping[str, Sequence[str]]) -> list[Row]:
    """The rows with the numbers of classes replaced by their names, and -1 by None.

    Args:
        names: of the classes, for each column that holds numbers of classes.

    Raises:
        UserError: a value is no number of a class.
    """
    return [row | {column: _name(row[column], names[column], column) for column in names} for row in rows]


def _name(value: Any, names: Sequence[str], column: str) -> str | None:
    if value is None or value == -1:
        return None
    if type(value) is not int or not 0 <= value < len(names):
        raise UserError(f"column '{column}' holds {value!r}, which is no number of its {len(names)} classes")
    return names[value]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
