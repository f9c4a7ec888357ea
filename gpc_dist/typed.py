"""JSON objects as dataclasses: what the program wrote itself, and others may have changed or handed over."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from gpc_dist import files
from gpc_dist.errors import UserError
from gpc_dist.shown import shown

T = TypeVar("T")


def read_as(kind: type[T], path: Path) -> T | None:
    """The JSON object in a file; None when the file is absent or holds no keys.

    Args:
        kind: a dataclass; keys that it does not have are left out.

    Raises:
        UserError: the file is no JSON object, lacks a key, or has another type of value under one.
    """
    values = files.read_json(path)
    return check_as(kind, values, str(path)) if values else None


def check_as(kind: type[T], values: Any, source: str) -> T:
    """A mapping as a dataclass.

    Raises:
        UserError: it is none, lacks a key, or has another type of value under one; `source` is what to call it.
    """
    try:
        return cast(T, _adapter(kind).validate_python(values))  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        at = f"{where}: " if where else ""
        raise UserError(shown(f"{source}: {at}{first['msg'].lower()}: restore or remove it")) from None


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no truth value."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # of more than 300 digits
        return False


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
