"""The distribution of a searched key: its values, and the condition under which it is set."""

from __future__ import annotations

import math
import re
from typing import Any, Literal, get_args

from pydantic import Field, model_serializer, model_validator

from gpc_dist.schema import Section
from gpc_dist.typed import is_number

Kind = Literal["choice", "grid", "uniform", "loguniform", "int", "logint"]

_EXAMPLES = (
    "[1, 2], {choice: [1, 2]}, {grid: [1, 2]}, {uniform: [0, 1]}, {loguniform: [1e-4, 1e-2]}, {int: [1, 8]}"
)
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


class Distribution(Section):
    """Written as `{KIND: VALUES, when: {KEY: VALUE}}`; a plain list is a choice."""

    kind: Kind
    """`choice`: one of a list; `grid`: each of a list in turn; `uniform`, `loguniform`: a number in a range;
    `int`, `logint`: a whole number in a range, both ends included. Log: all magnitudes are equally likely."""
    values: tuple[Any, ...]
    """The list, or the two ends of the range."""
    when: dict[str, tuple[Any, ...]] = Field({})
    """Condition: the key is set only if each of these keys, searched or fixed, has one of the values listed for it.
    A searched key that is not set itself has none of them."""

    @property
    def is_list(self) -> bool:
        return self.kind in ("choice", "grid")

    def holds(self, value: Any) -> bool:
        """Whether a value can have been drawn; the ends of a range up to rounding."""
        if self.is_list:
            return value in self.values
        if not is_number(value):
            return False
        low, high = self.values
        return low <= value <= high or math.isclose(value, low) or math.isclose(value, high)

    def probes(self) -> tuple[Any, ...]:
        """Return values that represent the distribution in checks: all of a list; the ends of a range, and a number
        with decimals between them if the range has such numbers."""
        if self.is_list or self.kind in ("int", "logint"):
            return self.values
        low, high = self.values
        return (low, high, low + (high - low) / math.e)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        if isinstance(given, list | tuple):
            given = {"choice": given}
        if not isinstance(given, dict):
            raise ValueError(f"one value is not searched: give it under settings, or give one of {_EXAMPLES}")
        kinds = [kind for kind in get_args(Kind) if kind in given]
        if len(kinds) != 1 or not given.keys() <= {kinds[0], "when"}:
            raise ValueError(f"give one of {_EXAMPLES}, and beside it at most when: {{KEY: VALUE}}")
        kind = kinds[0]
        if not isinstance(given[kind], list | tuple):
            raise ValueError(f"{kind} needs a list (given: {given[kind]!r})")
        when = given.get("when") or {}
        if not isinstance(when, dict):
            raise ValueError(f"when is a mapping of keys to values (given: {when!r})")
        return {
            "kind": kind,
            "values": [_number(value) for value in given[kind]],
            "when": {key: value if isinstance(value, list) else [value] for key, value in when.items()},
        }

    @model_validator(mode="after")
    def _check(self) -> Distribution:
        if self.is_list:
            if not self.values:
                raise ValueError(f"{self.kind} needs at least one value")
            if len({repr(value) for value in self.values}) < len(self.values):
                raise ValueError(f"{self.kind} has a value twice: {list(self.values)}")
            return self
        whole = self.kind in ("int", "logint")
        allowed = int if whole else int | float
        numbers = [v for v in self.values if isinstance(v, allowed) and is_number(v)]
        if len(self.values) != 2 or len(numbers) != 2 or not numbers[0] < numbers[1]:
            raise ValueError(
                f"{self.kind} needs two {'whole ' if whole else ''}numbers, the lower one first "
                f"(given: {list(self.values)})"
            )
        if self.kind in ("loguniform", "logint") and numbers[0] <= 0:
            raise ValueError(f"{self.kind} needs numbers above 0 (given: {list(self.values)})")
        return self

    @model_serializer
    def _write(self) -> dict[str, Any]:
        when = {key: list(values) for key, values in self.when.items()}
        return {self.kind: list(self.values)} | ({"when": when} if when else {})


def _number(value: Any) -> Any:
    """Convert text such as 1e-4 to a number: YAML 1.1 reads a number without a point as text."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
