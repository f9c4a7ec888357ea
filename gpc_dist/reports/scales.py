"""Positions of the values of a setting on an axis: linear, logarithmic or of categories."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gpc_dist.reports.comparison import shorten, show
from gpc_dist.typed import is_number

_LOG_RATIO = 8.0
_MOST_TICKS = 6
_TICK_GAP = 0.05
_NONE_GAP = 0.15
"""Share of an axis of numbers that separates None from them."""


@dataclass(frozen=True)
class Scale:
    """An axis from 0 to 1."""

    kind: Literal["linear", "log", "categories"]
    positions: list[float]
    """Of each value, from 0 to 1."""
    ticks: list[tuple[float, str]]


def scale_of(values: Sequence[Any]) -> Scale:
    """The axis of a setting: its values need not be of one type, and may be None."""
    numbers = [value for value in values if value is not None]
    if not numbers or not all(map(is_number, numbers)):
        return _categories(values)
    log = is_log(numbers)
    low, high = _transformed(min(numbers), log), _transformed(max(numbers), log)
    first = _NONE_GAP if len(numbers) < len(values) else 0.0

    def position(value: float | None) -> float:
        if value is None:
            return 0.0
        if low == high:
            return (1 + first) / 2
        return first + (1 - first) * (_transformed(value, log) - low) / (high - low)

    ticks = [(position(value), show(value)) for value in _tick_values(numbers, log)]
    if first:
        ticks.insert(0, (0.0, show(None)))
    return Scale("log" if log else "linear", [position(value) for value in values], _apart(ticks))


def is_log(numbers: Sequence[float]) -> bool:
    """Whether the numbers span a wide range and lie more evenly on a logarithmic axis than on a linear one."""
    distinct = sorted(set(numbers))
    if distinct[0] <= 0 or distinct[-1] / distinct[0] < _LOG_RATIO:
        return False
    return _unevenness([math.log(number) for number in distinct]) < _unevenness(distinct)


def _unevenness(ascending: Sequence[float]) -> float:
    """Sum of the distances of the numbers from equal spacing, as shares of their range."""
    low, span, last = ascending[0], ascending[-1] - ascending[0], len(ascending) - 1
    return sum(abs((number - low) / span - place / last) for place, number in enumerate(ascending))


def _transformed(value: float, log: bool) -> float:
    return math.log(value) if log else value


def _tick_values(numbers: Sequence[float], log: bool) -> list[float]:
    """The values themselves if they are few, else equally spaced ones."""
    distinct = sorted(set(numbers))
    if len(distinct) <= _MOST_TICKS:
        return distinct
    low, high = _transformed(distinct[0], log), _transformed(distinct[-1], log)
    evenly = [low + (high - low) * part / (_MOST_TICKS - 2) for part in range(_MOST_TICKS - 1)]
    return [float(f"{math.exp(value) if log else value:.2g}") for value in evenly[1:-1]] + [
        distinct[0],
        distinct[-1],
    ]


def _categories(values: Sequence[Any]) -> Scale:
    names = sorted({show(value) for value in values})
    places = {name: (number + 0.5) / len(names) for number, name in enumerate(names)}
    if len(names) > 1:
        places = {name: number / (len(names) - 1) for number, name in enumerate(names)}
    ticks = [(place, shorten(name, 16)) for name, place in places.items()]
    return Scale("categories", [places[show(value)] for value in values], _apart(ticks))


def _apart(ticks: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """The ticks in order, without those too near to the one before to be legible."""
    kept: list[tuple[float, str]] = []
    for place, label in sorted(ticks):
        if not kept or place - kept[-1][0] >= _TICK_GAP:
            kept.append((place, label))
    return kept
