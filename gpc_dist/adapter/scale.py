"""The scale of hidden states, and rescaling of a cell's result to that of other states (`adapter.cell_scale`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_EPSILON = 1e-12
"""Added to mean squares, because the root has no gradient at exactly 0."""


def rms(states: Tensor) -> Tensor:
    """Root mean square of each position: `[..., H] -> [..., 1]`."""
    return (states.square().mean(-1, keepdim=True) + _EPSILON).sqrt()


def normed(states: Tensor) -> Tensor:
    """`states [..., H]` rescaled to a root mean square of 1 at each position."""
    return F.rms_norm(states, states.shape[-1:], eps=_EPSILON)


def rescaled(written: Tensor, target: Tensor) -> Tensor:
    """`written [B, P, H]` rescaled to the root mean square `target [B, P or 1, 1]` at each position."""
    return written * (target / rms(written))  # this order is exact where the scale stays


@torch.no_grad()
def text_rms(states: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean root mean square of each row's text states, without gradient: float32 `[B, 1, 1]`.

    Args:
        states: `[B, T, H]`; they are not copied.
        attention_mask: `[B, T]`, 1 for text.
    """
    norms = torch.linalg.vector_norm(states, dim=-1, dtype=torch.promote_types(states.dtype, torch.float32))
    text = attention_mask.to(norms.dtype)
    mean = (norms * text).sum(1) / text.sum(1).clamp(min=1) / states.shape[-1] ** 0.5
    return mean[:, None, None]
