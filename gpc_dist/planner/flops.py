"""Floating-point operations of a pass, counted by torch's `FlopCounterMode` while the planner runs it dry.

Matrix products, convolutions and attention count, at 2 FLOPs for a multiplication and its addition; elementwise
operators do not. The encoder is frozen, so the backward pass computes gradients of activations only: about 2 FLOPs
for each weight and token, as in the forward pass, where full training takes 4 (Kaplan et al. 2020, section 2.1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpc_dist.private.torch import (
    CPU_ATTENTION,
    CPU_ATTENTION_BACKWARD,
    flop_counter_without_modules,
    sdpa_flop_count,
)

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


def flop_counter() -> FlopCounterMode:
    """A counter of the FLOPs of everything that runs inside it."""
    # torch has formulas for the kernels of GPUs only, and dry runs take place on the CPU
    return flop_counter_without_modules(
        {CPU_ATTENTION: _attention, CPU_ATTENTION_BACKWARD: _attention_backward}
    )


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """Four products, twice those of the forward pass. Kernels recompute the scores to save memory, which is not
    counted."""
    return 2 * sdpa_flop_count(query, key, value)
