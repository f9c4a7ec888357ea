"""Activations and norms of frozen encoders, each in one kernel of torch.

`transformers` computes T5's activation and norm operator by operator. On a GPU each operator reads and writes all
of `[B, P+T, inner size]`, so that a layer waits for memory longer than its matrix products take, and autograd keeps
the intermediate results: four times the activation's input instead of once, three times the norm's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def fuse_elementwise(model: nn.Module) -> None:
    """Fuse the activations and norms of a frozen encoder, in place; values change by rounding only."""
    from gpc_dist.private.transformers import new_gelus, replace_t5_norms

    for parent, name in new_gelus(model):
        setattr(parent, name, nn.GELU(approximate="tanh"))
    replace_t5_norms(model, _norm)


def _norm(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root mean square norm over the last dimension."""
    if states.is_cuda:
        return F.rms_norm(states, weight.shape, weight, epsilon)
    return _FrozenNorm.apply(states, weight, epsilon)


class _FrozenNorm(torch.autograd.Function):
    """A norm that keeps what torch's GPU kernel keeps for the backward pass: the input and one number per position."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        inverse = states.float().square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(states, weight, inverse)
        return (states * inverse).to(states.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        states, weight, inverse = ctx.saved_tensors
        normed = states * inverse
        gradient = gradient * weight
        along = (gradient * normed).mean(-1, keepdim=True)
        return (gradient - normed.mul_(along)).mul(inverse).to(states.dtype), None, None
