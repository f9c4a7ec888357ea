"""Synthetic examples with the lengths of real texts, for benchmarks."""

from __future__ import annotations

import numpy as np

from gpc_dist.errors import UserError
from gpc_dist.tasks.encode import Encoded

SUPERGLUE = {
    "boolq": (120, 0.50),
    "cb": (72, 0.44),
    "multirc": (355, 0.39),
    "rte": (56, 0.52),
    "wic": (26, 0.22),
    "wsc": (26, 0.43),
}
"""Tokens of a row: the median, and the standard deviation of the logarithm, which with the median describes a
log-normal distribution. Measured on the official training splits (up to 3,000 examples each) with the
tokenizer of all-MiniLM-L6-v2, special tokens included, before truncation."""

LENGTHS = ("fixed", "mix", *SUPERGLUE)
"""Kinds of `draw_lengths`: all rows of the greatest length, equal numbers of rows like each task of `SUPERGLUE`, or
rows like one of these tasks."""


def draw_lengths(kind: str, count: int, max_length: int, seed: int = 0) -> np.ndarray:
    """Tokens of `count` rows, at least 4 and at most `max_length`, int64 `[count]`.

    Raises:
        UserError: the kind is not in `LENGTHS`.
    """
    if kind not in LENGTHS:
        raise UserError(f"--lengths '{kind}' is unknown: give one of {', '.join(LENGTHS)}")
    if kind == "fixed":
        return np.full(count, max_length)
    tasks = list(SUPERGLUE.values()) if kind == "mix" else [SUPERGLUE[kind]]
    random = np.random.Generator(np.random.PCG64(seed))
    median, spread = np.array(tasks)[np.arange(count) % len(tasks)].T
    drawn = np.exp(np.log(median) + spread * random.standard_normal(count))
    return drawn.round().astype(np.int64).clip(4, max_length)


def synthetic(lengths: np.ndarray, vocabulary: int, seed: int = 0) -> Encoded:
    """Examples of one row each, with random tokens and a random one of two labels.

    Args:
        lengths: tokens of each row, int64 `[N]`.
        vocabulary: token ids are below it.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    count = len(lengths)
    return Encoded(
        segment_ids=random.integers(0, vocabulary, int(lengths.sum()), dtype=np.int32),
        segment_starts=np.concatenate([[0], np.cumsum(lengths)]),
        row_segments=np.arange(count)[:, None],
        row_kept=lengths[:, None],
        frame=((None, 0),),
        has_token_types=False,
        example_starts=np.arange(count + 1),
        targets=random.integers(0, 2, count),
    )
