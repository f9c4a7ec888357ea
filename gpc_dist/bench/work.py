"""FLOPs of the measured steps, from which MFU and HFU are computed.

MFU counts what the method needs (Chowdhery et al. 2022, appendix B): text and prompt tokens, no padding, nothing
twice. HFU counts what activation checkpointing recomputes as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import Polynomial

from gpc_dist.planner.dry_run import Activations, ModelSpec, Way, measure_ways


@dataclass(frozen=True)
class Work:
    """Floating-point operations, forward and backward."""

    model: float
    """Needed by the method: the numerator of MFU."""
    hardware: float
    """With what is recomputed: the numerator of HFU."""


def count_work(model: ModelSpec, lengths: np.ndarray, *, sharded: bool, recompute: bool) -> Work:
    """The work of running each row once, forward and backward.

    Args:
        lengths: text tokens of the rows, without padding, int64 `[R]`.
        sharded: at ZeRO-3.
        recompute: with activation checkpointing.

    Raises:
        UserError: a family that cannot hold a prompt.
    """
    distinct = np.unique(lengths)
    # matrix products are linear in a row's length and attention is quadratic: three lengths determine all others
    points = np.unique(distinct[[0, len(distinct) // 2, -1]])

    ways = [Way(sharded), Way(sharded, recompute)]
    plain, run = zip(*(measure_ways(model, int(n), ways) for n in points), strict=True)

    def flops(passes: Sequence[Activations]) -> float:
        # the FLOPs that one more row adds; what a pass computes once for all rows is constant, so not needed
        rows = [each.at(1).flops - each.at(0).flops for each in passes]
        found = Polynomial.fit(points, rows, len(points) - 1, domain=[0, points[-1]])
        return float(found(lengths).sum())

    return Work(model=flops(plain), hardware=flops(run))
