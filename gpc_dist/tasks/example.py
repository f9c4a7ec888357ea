"""Examples, the form into which every task is read: rows of one or two text segments."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Kind = Literal["classification", "choice", "regression"]
Split = Literal["train", "validation", "test"]
Target = int | float | tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to predict, before tokenisation."""

    id: Any
    """The source's own identifier (a JSON value), or the row number where it has none."""
    rows: tuple[tuple[str, str | None], ...]
    """`(text, pair)` segments: one row to classify or to rate, one row per candidate to choose."""
    target: Target = None
    """Class index; number (always a float); indices of all right candidates; None: unlabelled."""
    group: Hashable = None
    """Examples that are scored together share it (the answers to one MultiRC question)."""
    source: Hashable = None
    """Examples on one text share it (the questions on one passage), where the data tells."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Other values that scoring and submission need: candidate strings, gold answers."""


def limit(examples: Sequence[Example], most: int | None, seed: int | None = None) -> list[Example]:
    """At most `most` examples in source order: with a `seed` a random sample, without it the first ones."""
    if most is None or most >= len(examples):
        return list(examples)
    if seed is None:
        return list(examples[:most])
    chosen = np.random.Generator(np.random.PCG64(seed)).choice(len(examples), most, replace=False)
    return [examples[i] for i in sorted(chosen)]
