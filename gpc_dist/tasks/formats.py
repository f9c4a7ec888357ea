"""Rows of one file, whatever its format. pyarrow is imported on use."""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpc_dist.errors import UserError
from gpc_dist.parsing import parse_json
from gpc_dist.tasks.delimited import DELIMITERS, Quoting, read_delimited, refuse_repeated

Row = dict[str, Any]

_TEXT = (".jsonl", ".json", *DELIMITERS)
SUFFIXES = (*_TEXT, ".parquet", *(f"{suffix}.gz" for suffix in _TEXT))
"""Endings of the names of files that can be read."""

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
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    kind = suffix.removesuffix(".gz")
    if kind in DELIMITERS:
        return read_delimited(text, str(path), DELIMITERS[kind], quoting)
    if kind == ".json" and text.lstrip().startswith("["):
        return _parse_json_array(text, str(path))
    return _parse_json_lines(text, str(path))


def _read_text(path: Path, packed: bool) -> str:
    data = path.read_bytes()
    if packed:
        try:
            data = gzip.decompress(data)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path} is not a whole gzip file ({error}): fetch it again") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"line {line} of {path} is not UTF-8 text ({error.reason}): convert it first"
        ) from None


def _parse_json_array(text: str, source: str) -> list[Row]:
    rows: list[Row] = _load_json(text, source)
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
        row = _load_json(line, source, number)
        if not isinstance(row, dict):
            raise UserError(f"line {number} of {source} is not a JSON object: write one object per line")
        rows.append(row)
    return rows


def _load_json(text: str, source: str, line: int = 1) -> Any:
    """The value of a JSON text that begins in a line of its file."""

    def unique(pairs: list[tuple[str, Any]]) -> Row:
        if len(found := dict(pairs)) < len(pairs):
            refuse_repeated([name for name, _ in pairs], f"an object in line {line} of {source}")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise UserError(f"line {line} of {source} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        line += getattr(error, "lineno", 1) - 1
        raise UserError(
            f"line {line} of {source} is not valid JSON ({error}): write one JSON object per line"
        ) from None


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        # not `read_table`, which makes columns of folders that are named `key=value`
        table = pyarrow.parquet.ParquetFile(path).read()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file: {_first_line(error)}") from None
    refuse_repeated(table.column_names, str(path))
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


def _class_names(metadata: Mapping[bytes, bytes], source: str) -> dict[str, list[str]]:
    """Names of the classes by column, where `datasets` wrote the file and with it that a column holds their numbers."""
    described = parse_json(metadata.get(b"huggingface", b"{}"), source)
    features = described.get("info", {}).get("features") or {}
    return {
        column: feature["names"]
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


def name_classes(rows: list[Row], names: Mapping[str, Sequence[str]]) -> list[Row]:
    """The rows with the numbers of classes replaced by their names, and -1 by None.

    Args:
        names: of the classes, for each column that holds numbers of classes.
    """
    return [
        row | {c: names[c][row[c]] if row[c] is not None and row[c] >= 0 else None for c in names}
        for row in rows
    ]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
