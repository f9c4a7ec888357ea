"""Rows of a split as plain dictionaries, from local files or the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from gpc_dist.config import DataConfig
from gpc_dist.errors import UserError
from gpc_dist.shown import shown
from gpc_dist.tasks.example import Split
from gpc_dist.tasks.formats import Row, name_classes, read_file
from gpc_dist.tasks.splits import split_files

_DEMO = Path(__file__).parents[1] / "recipes" / "demo_data"


@dataclass(frozen=True)
class Source:
    """Where rows come from, for messages."""

    parts: Sequence[tuple[str, int]]
    """The name and the number of rows of each file, in order."""

    def __str__(self) -> str:
        first, more = self.parts[0][0], len(self.parts) - 1
        return f"{first} and {more} more" if more else first

    @contextmanager
    def at(self, number: int) -> Iterator[None]:
        """Let errors name the row with this number, counted from 0 over all parts."""
        try:
            yield
        except UserError as error:
            raise UserError(shown(f"{self._row(number)}: {error}")) from None

    def _row(self, number: int) -> str:
        for name, count in self.parts:
            if number < count:
                return f"row {number + 1} of {name}"
            number -= count
        raise IndexError(number)


def the_input(rows: Sequence[Row]) -> Source:
    """The source of rows that are not from a file."""
    return Source([("the input", len(rows))])


def read_rows(
    data: DataConfig, split: Split, hub_config: str | None = None, only: str | None = None
) -> tuple[Source, list[Row]]:
    """The rows of one split and where they come from.

    Args:
        data: `data.path` is a folder, a file (the training split), a Hub id or `demo` (the data of
            that recipe); `data.train`, `data.validation` and `data.test` name a file (in that
            folder, or any path) or a Hub split that does not have a usual name.
        hub_config: configuration name to take from the Hub when `data.config` is not set.
        only: name of the data's one file, which is any split; on the Hub it is `test`.

    Raises:
        UserError: nothing found under the name, several files for one split, unknown file type,
            malformed content, no rows.
    """
    named: str | None = getattr(data, split)
    config = data.config or hub_config
    path = _DEMO if data.path == "demo" else Path(data.path) if data.path else None
    if path is not None and not path.exists() and _is_hub_id(str(data.path)):
        on_hub = named or ("test" if only else split)
        tables = [(f"{data.path} ({split})", _read_hub(str(data.path), config, on_hub))]
    else:
        files = split_files(path, split, named or only, config)
        tables = [(str(file), read_file(file, data.quoting)) for file in files]
    source = Source([(name, len(rows)) for name, rows in tables])
    rows = list(chain.from_iterable(rows for _, rows in tables))
    if not rows:
        raise UserError(f"{source} has no rows: the {split} split needs at least one")
    return source, rows


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None


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
    names = {column: feature.names for column, feature in table.features.items() if hasattr(feature, "names")}
    return name_classes(list(table), names)
