"""Floating-point operations of a pass, counted by torch's `FlopCounterMode` while the planner runs it dry.

Matrix products, convolutions and attention count, at 2 FLOPs for a multiplication and its addition; elementwise
operators do not. The encoder is frozen, so the backward pass computes gradients of activations only: about 2 FLOPs
for each weight and token, as in the forward pass, where full training takes 4 (Kaplan et al. 2020, section 2.1).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def flop_counter() -> FlopCounterMode:
    """A counter of the FLOPs of everything that runs inside it."""
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    # its hooks on modules keep what activation checkpointing recomputes: the peak of a dry run would double
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


class _NoModules(nullcontext[None]):
    """Replaces the tracker that attributes FLOPs to modules."""

    parents = frozenset({"Global"})


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """Four products, twice those of the forward pass. Kernels recompute the scores to save memory, which is not
    counted."""
    return 2 * sdpa_flop_count(query, key, value)


# torch has formulas for the kernels of GPUs only, and dry runs take place on the CPU
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
