"""The head: computes the task's outputs from pooled states of the last layer, or of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from gpc_dist.adapter.scale import normed, rms


class Head(nn.Module):
    """A linear map of pooled states. The caller chooses the states: of the text or of the prompt.

    Args:
        outputs: classes of a classification, or 1 for a score or a number.
        mixed: number of pooled states, of several layers, whose mix is read; only the last one's when not given.
        hidden: whether a square layer with tanh stands before the linear map.
    """

    def __init__(self, hidden_size: int, outputs: int, mixed: int | None = None, hidden: bool = False):
        super().__init__()
        self.linear = nn.Linear(hidden_size, outputs)
        self.hidden = nn.Linear(hidden_size, hidden_size) if hidden else None
        self.mix = None if mixed is None else nn.Parameter(torch.zeros(mixed))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Pooled states `[R, H]` of each layer that it reads, in order -> float32 outputs `[R, outputs]`."""
        read = states[-1] if self.mix is None else mixed(states, self.mix)
        read = read.to(self.linear.weight.dtype)
        return self.linear(read if self.hidden is None else torch.tanh(self.hidden(read)))


def mixed(states: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Mean of states `[R, H]` by the softmax of weights, one for each (Peters et al. 2018, equation 1); states of
    different layers are brought to the root mean square of the last one's."""
    size = rms(states[-1])
    shares = torch.softmax(weights, dim=0)
    parts = [share * normed(each) * size for share, each in zip(shares, states[:-1], strict=False)]
    return torch.stack([*parts, shares[-1] * states[-1]]).sum(dim=0)


def pooled(states: Tensor, attention_mask: Tensor, pooling: Literal["mean", "first"]) -> Tensor:
    """`[R, T, H]` states and their mask `[R, T]` -> float32 `[R, H]`."""
    if pooling == "first":
        return states[:, 0].float()
    there = attention_mask.unsqueeze(-1).bool()
    total = torch.sum(states.masked_fill(~there, 0), dim=1, dtype=torch.float32)
    return total / there.sum(dim=1).clamp(min=1)
