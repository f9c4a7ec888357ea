"""The head: computes the task's outputs from states of the last layer."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """A linear map of pooled states. The caller chooses the states: of the text or of the prompt.

    Args:
        outputs: classes of a classification, or 1 for a score or a number.
        pooling: `mean` of the states, or the `first` one.
    """

    def __init__(self, hidden_size: int, outputs: int, pooling: Literal["mean", "first"]):
        super().__init__()
        self.pooling = pooling
        self.linear = nn.Linear(hidden_size, outputs)

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """`[R, T, H]` states and their mask `[R, T]` -> float32 outputs `[R, outputs]`."""
        return self.linear(pooled(states, attention_mask, self.pooling).to(self.linear.weight.dtype))


def pooled(states: Tensor, attention_mask: Tensor, pooling: Literal["mean", "first"]) -> Tensor:
    """`[R, T, H]` states and their mask `[R, T]` -> float32 `[R, H]`."""
    if pooling == "first":
        return states[:, 0].float()
    there = attention_mask.unsqueeze(-1).bool()
    total = torch.sum(states.masked_fill(~there, 0), dim=1, dtype=torch.float32)
    return total / there.sum(dim=1).clamp(min=1)
