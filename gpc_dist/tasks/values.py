"""Values of a table as text, and the one spelling that a label has in all formats."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from datetime import date, time
from decimal import Decimal
from functools import lru_cache
from numbers import Number
from typing import Any

from gpc_dist.errors import UserError

_WHOLE = re.compile(r"(-?\d+)\.0+", re.ASCII)


def is_null(value: Any) -> bool:
    """Whether a value is None, or the NaN that stands for None in data frames."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_of(value: Any) -> str:
    """A text as it is, UTF-8 bytes decoded, a boolean as JSON spells it, a number or a date as Python does.

    Raises:
        UserError: any other value; the message says what the value is, see `in_column`.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Number | date | time):
        return str(value)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError("holds bytes that are not UTF-8 text: write text") from None
    kind = {"dict": "an object", "list": "a list", "ndarray": "a list"}.get(type(value).__name__)
    raise UserError(f"holds {kind or f'a {type(value).__name__}'}: write one text or number")


def in_column(column: str, convert: Callable[[Any], str], value: Any) -> str:
    """What `text_of` or `label_of` makes of a value in a column; an error of theirs names the column."""
    try:
        return convert(value)
    except UserError as error:
        raise UserError(f"column '{column}' {error}") from None


def label_of(value: Any) -> str:
    """The spelling of a label, whatever its type in the file: `3` for 3, 3.0 and ` 3.0 `; `true` for True and `TRUE`;
    Unicode's composed form (NFC), without blanks around it; empty for a missing label.

    Raises:
        UserError: see `text_of`.
    """
    if is_null(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return _spelling(text_of(value))


@lru_cache(maxsize=10_000)  # a table has few labels and many rows
def _spelling(label: str) -> str:
    text = unicodedata.normalize("NFC", label).strip()
    if text.lower() in ("true", "false"):
        return text.lower()
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


def alike(label: str) -> str:
    """What labels have in common that differ only in case, in blanks, hyphens and underscores, in characters that look
    the same or are not seen, or in how a number is written."""
    try:
        return str(Decimal(label).normalize())
    except ArithmeticError:
        pass
    seen = "".join(c for c in unicodedata.normalize("NFKC", label) if unicodedata.category(c) != "Cf")
    return re.sub(r"[\s_-]+", " ", seen.casefold())


def near_equal(counts: Mapping[str, int]) -> list[str]:
    """Descriptions of the groups of labels that are `alike`, each label with its number of rows."""
    groups: dict[str, list[str]] = {}
    for label, count in counts.items():
        groups.setdefault(alike(label), []).append(f"'{label}' ({count} row{'s' if count > 1 else ''})")
    return [" and ".join(group) for group in groups.values() if len(group) > 1]


def likeliest(label: str, labels: Iterable[str]) -> str | None:
    """The one of `labels` that is `alike` a label that is none of them."""
    return next((other for other in labels if alike(other) == alike(label)), None)
