"""Rows of a split as plain dictionaries, from local files or the Hugging Face Hub.

JSON Lines, CSV and TSV need nothing but the standard library; pyarrow (for Parquet) and datasets (for
the Hub) are imported on use.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpc_dist.config import DataConfig
from gpc_dist.errors import UserError
from gpc_dist.tasks.example import Split

Row = dict[str, Any]

_STEMS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test",),
}

_DEMO = Path(__file__).parents[1] / "recipes" / "demo_data"


def read_rows(data: DataConfig, split: Split, hub_config: str | None = None) -> tuple[str, list[Row]]:
    """The rows of one split and the name of their source (for messages).

    Args:
        data: `data.path` is a folder, a file (the training split), a Hub id or `demo` (the data of
            that recipe); `data.train`, `data.validation` and `data.test` name a file (in that
            folder, or any path) or a Hub split that does not have a usual name.
        hub_config: configuration name to take from the Hub when `data.config` is not set.

    Raises:
        UserError: nothing found under the name, several files for one split, unknown file type,
            malformed content, no rows.
    """
    named: str | None = getattr(data, split)
    path = _DEMO if data.path == "demo" else Path(data.path) if data.path else None
    if path is not None and not path.exists() and _is_hub_id(str(data.path)):
        source = f"{data.path} ({split})"
        rows = _read_hub(str(data.path), data.config or hub_config, named or split)
    else:
        file = _local_file(path, split, named)
        source = str(file)
        rows = read_file(file)
    if not rows:
        raise UserError(f"{source} has no rows: the {split} split needs at least one")
    return source, rows


def read_file(path: Path) -> list[Row]:
    """The rows of a `.jsonl`/`.json` (JSON Lines), `.csv`, `.tsv` or `.parquet` file.

    Raises:
        UserError: another kind of file, malformed content, or a file that cannot be read.
    """
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise UserError(f"cannot read {path}: its name must end in {', '.join(_READERS)}")
    try:
        return list(reader(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}): convert it first") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None


def _local_file(path: Path | None, split: Split, named: str | None) -> Path:
    if named is not None:
        folder = path if path is None or path.is_dir() else path.parent
        candidates = [folder / named] if folder is not None else []
        candidates.append(Path(named))
        for file in candidates:
            if file.is_file():
                return file
        looked = " and ".join(str(file) for file in dict.fromkeys(candidates))
        raise UserError(f"data.{split} '{named}' does not exist (looked at {looked})")
    if path is None:
        raise UserError(
            f"no data: set data.path to a folder with a {split} file or to a Hub id, "
            f"or data.{split} to a file"
        )
    if path.is_file():
        if split == "train":
            return path
        raise UserError(
            f"data.path is the single file {path}, read as the training split: "
            f"set data.{split} to the {split} file"
        )
    if not path.is_dir():
        raise UserError(f"data.path {path} does not exist: give a folder, a file or a Hub id")
    return _usual_file(path, split)


def _usual_file(folder: Path, split: Split) -> Path:
    wanted = [stem + suffix for stem in _STEMS[split] for suffix in _READERS]
    found = [folder / name for name in wanted if (folder / name).is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{folder} has several {split} files ({names}): set data.{split} to one")
    held = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
    raise UserError(
        f"no {split} file in {folder} (looked for {', '.join(_STEMS[split])} with "
        f"{', '.join(_READERS)}; it holds {held}): set data.{split} to a file"
    )


def _read_json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"line {number} of {path} is not valid JSON ({error}): write one JSON object per line"
                ) from None
            if not isinstance(row, dict):
                raise UserError(f"line {number} of {path} is not a JSON object: write one object per line")
            yield row


def _read_csv(path: Path) -> Iterator[Row]:
    return _read_delimited(path, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _read_tsv(path: Path) -> Iterator[Row]:
    # In IANA text/tab-separated-values and in GLUE's files a quote is an ordinary character. With
    # quoting, a text that starts with a lone quote would swallow the rows after it.
    return _read_delimited(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_delimited(path: Path, delimiter: str, quoting: int) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, quoting=quoting)  # type: ignore[arg-type]
        try:
            header = next(reader, [])
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise UserError(
                        f"line {reader.line_num} of {path} has {len(fields)} fields, its header "
                        f"has {len(header)}: {', '.join(header)}"
                    )
                yield dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise UserError(f"line {reader.line_num} of {path} is malformed: {error}") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        yield from pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from None


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def _read_hub(name: str, config: str | None, split: str) -> list[Row]:
    import datasets

    try:
        table = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the Hub client raises a dozen types: network, names, builders
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"data.path '{name}' is no local file or folder, and split '{split}' of it could not "
            f"be taken from the Hugging Face Hub: {reason}"
        ) from None
    return name_classes(list(table), table.features)


def name_classes(rows: list[Row], features: Any) -> list[Row]:
    """The rows with the integers of `datasets.ClassLabel` columns replaced by their names, and -1 by None."""
    names = {column: feature.names for column, feature in features.items() if hasattr(feature, "names")}
    return [
        row | {c: names[c][row[c]] if row[c] is not None and row[c] >= 0 else None for c in names}
        for row in rows
    ]
