"""Learning rate schedules."""

from __future__ import annotations

import math
from typing import Literal


def factor(schedule: Literal["linear", "cosine", "constant"], step: int, warmup: int, total: int) -> float:
    """Share of the peak learning rate at a step, between 0 and 1.

    Rises in a line over the first `warmup` steps; then stays (`constant`), or falls to 0 at `total`
    in a line or along half a cosine.

    Args:
        step: steps made so far, from 0.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return max(0.0, 1.0 - done)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
