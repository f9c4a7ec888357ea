"""The scale of hidden states, and bringing what a cell writes to that of other states (`adapter.cell_scale`)."""

from __future__ import annotations

import torch
from torch import Tensor


def rms(states: Tensor) -> Tensor:
    """Root mean square of each position: `[..., H] -> [..., 1]`."""
    # not at exactly 0, where the root has no gradient
    return (states.square().mean(-1, keepdim=True) + 1e-12).sqrt()


def rescaled(written: Tensor, target: Tensor) -> Tensor:
    """`written [B, P, H]` with the root mean square `target [B, P or 1, 1]` at each position."""
    return written * (target / rms(written))


@torch.no_grad()
def text_rms(states: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean root mean square of each row's text states, as a constant: float32 `[B, 1, 1]`.

    Args:
        states: `[B, T, H]`; they are not copied.
        attention_mask: `[B, T]`, 1 for text.
    """
    norms = torch.linalg.vector_norm(states, dim=-1, dtype=torch.promote_types(states.dtype, torch.float32))
    text = attention_mask.to(norms.dtype)
    mean = (norms * text).sum(1) / text.sum(1).clamp(min=1) / states.shape[-1] ** 0.5
    return mean[:, None, None]
