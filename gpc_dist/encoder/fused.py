"""Activations and norms of frozen encoders, each in one kernel of torch.

`transformers` computes T5's activation and norm operator by operator. On a GPU each operator reads and writes all
of `[B, P+T, inner size]`, so that a layer waits for memory longer than its matrix products take, and autograd keeps
the intermediate results: four times the activation's input instead of once, three times the norm's.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def fuse_elementwise(model: nn.Module) -> None:
    """Fuse the activations and norms of a frozen encoder, in place; values change by rounding only."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "NewGELUActivation":
                setattr(module, name, nn.GELU(approximate="tanh"))
        if type(module).__name__ in ("T5LayerNorm", "MT5LayerNorm", "UMT5LayerNorm"):
            module.forward = MethodType(_norm, module)


def _norm(self: Any, states: Tensor) -> Tensor:
    """Root mean square norm over the last dimension."""
    if self.weight.requires_grad:
        return type(self).forward(self, states)
    states = states.to(self.weight.dtype)
    if states.is_cuda:
        return F.rms_norm(states, self.weight.shape, self.weight, self.variance_epsilon)
    return _FrozenNorm.apply(states, self.weight, self.variance_epsilon)


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
