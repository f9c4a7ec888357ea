"""Bootstrap of the scores on a data set (Efron 1979).

Examples are drawn with replacement. Examples made of one text are drawn together where the data identify the text,
because they are not independent of each other. Every draw is scored by the task's own metric, for every run; the runs
of a method (its seeds) are averaged. Methods are scored on the same draws, so the difference of two methods is paired.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from gpc_dist.tasks.example import Example
from gpc_dist.tasks.metrics import (
    Metric,
    accuracy,
    multirc_exact_match,
    record_exact_match,
    record_f1,
)


def _questions(examples: Sequence[Example]) -> int:
    return len({example.group for example in examples})


_MEANS: dict[Metric, Callable[[Sequence[Example]], int]] = {
    accuracy: len,
    record_f1: len,
    record_exact_match: len,
    multirc_exact_match: _questions,
}
"""Metrics that are means, each with the number of items that it averages: scores of units give a draw's score."""


def units(examples: Sequence[Example]) -> list[np.ndarray]:
    """Return the units to draw: the indices of examples that are drawn together, int64 `[n]` each."""
    found: dict[Hashable, list[int]] = {}
    for number, example in enumerate(examples):
        key: Hashable = ("alone", number)
        if example.source is not None:
            key = ("source", example.source)
        elif example.group is not None:
            key = ("group", example.group)
        found.setdefault(key, []).append(number)
    return [np.array(unit) for unit in found.values()]


def draw_units(count: int, draws: int, seed: int = 0) -> np.ndarray:
    """Draw with replacement: the units of each draw, int64 `[draws, count]`."""
    return np.random.Generator(np.random.PCG64(seed)).integers(count, size=(draws, count))


def score_draws(
    metric: Metric, examples: Sequence[Example], decisions: np.ndarray, drawn: np.ndarray
) -> np.ndarray:
    """Return a metric of every draw, float64 `[draws]`.

    Args:
        decisions: of one run, `[N]`.
        drawn: result of `draw_units` for the units of the examples.
    """
    parts = units(examples)
    if size := _MEANS.get(metric):
        groups = [[examples[n] for n in part] for part in parts]
        sizes = np.array([size(group) for group in groups], dtype=np.float64)
        sums = sizes * [metric(group, decisions[part]) for group, part in zip(groups, parts, strict=True)]
        return sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    scores = []
    for line in drawn:
        chosen = np.concatenate([parts[unit] for unit in line])
        scores.append(metric([examples[n] for n in chosen], decisions[chosen]))
    return np.array(scores)


def resampled(
    metrics: Sequence[Metric], examples: Sequence[Example], runs: Sequence[np.ndarray], drawn: np.ndarray
) -> np.ndarray:
    """Return the score of every draw, float64 `[draws]`: the mean over metrics and over the runs of a method.

    Args:
        runs: decisions of each run, `[N]`.
    """
    return np.mean([score_draws(metric, examples, run, drawn) for run in runs for metric in metrics], axis=0)


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return the ends between which the middle share `level` of the draws lies (percentile interval)."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
