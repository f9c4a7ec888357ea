"""The head: reads the text states of the last layer and gives the task's outputs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """A linear map of pooled text states; prompt positions are never pooled.

    Args:
        outputs: classes of a classification, or 1 for a score or a number.
        pooling: `mean` of the text states, or the state of the `first` text token.
    """

    def __init__(self, hidden_size: int, outputs: int, pooling: Literal["mean", "first"]):
        super().__init__()
        self.pooling = pooling
        self.linear = nn.Linear(hidden_size, outputs)

    def forward(self, text_states: Tensor, attention_mask: Tensor) -> Tensor:
        """`[R, T, H]` states and their mask `[R, T]` -> float32 outputs `[R, outputs]`."""
        if self.pooling == "first":
            pooled = text_states[:, 0].float()
        else:
            text = attention_mask.unsqueeze(-1).bool()
            total = torch.sum(text_states.masked_fill(~text, 0), dim=1, dtype=torch.float32)
            pooled = total / text.sum(dim=1).clamp(min=1)
        return self.linear(pooled.to(self.linear.weight.dtype))
