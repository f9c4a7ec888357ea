"""The cell: the rule that writes the next layer's prompt state.

Notation: `e` is the prompt as layer *l* encoded it, `p` the prompt state that entered layer *l*; both
are `[B, P, H]`. The public text of arXiv 2304.05642 gives the mechanism (RNN-inspired, a
remembering unit on `e`, a forgetting unit on `p`, one module for all layers) and not its
equations; each class says which reading of it it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Unit(nn.Sequential):
    """A linear map `[..., H] -> [..., H]` without bias, as one matrix or as a product of rank `rank`.

    Args:
        zero: start at the zero map (the product's second factor only, so that gradients flow).
    """

    def __init__(self, hidden_size: int, rank: int | None, zero: bool = False):
        last = nn.Linear(rank or hidden_size, hidden_size, bias=False)
        if zero:
            nn.init.zeros_(last.weight)
        if rank is None:
            super().__init__(last)
        else:
            super().__init__(nn.Linear(hidden_size, rank, bias=False), last)


class RecurrentCell(nn.Module):
    """`tanh(W_r e + W_f p + b)`: the Elman reading.

    The state is bounded by 1, whatever the scale of the encoder's hidden states.
    """

    def __init__(self, hidden_size: int, rank: int | None):
        super().__init__()
        self.remember = Unit(hidden_size, rank)
        self.forget = Unit(hidden_size, rank)
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, encoded: Tensor, previous: Tensor) -> Tensor:
        return torch.tanh(self.remember(encoded) + self.forget(previous) + self.bias)


class GatedCell(nn.Module):
    """`f * p + (1 - f) * e` with `f = sigmoid(R(e) + F(p) + b)`: the forget-gate reading.

    Per feature, the gate decides how much of the encoded prompt is kept and how much of the
    previous one. It starts nearly closed (`b = -4`, f of about 0.02): close to vanilla prompt tuning.
    """

    def __init__(self, hidden_size: int, rank: int | None):
        super().__init__()
        self.remember = Unit(hidden_size, rank, zero=True)
        self.forget = Unit(hidden_size, rank, zero=True)
        self.bias = nn.Parameter(torch.full((hidden_size,), -4.0))

    def forward(self, encoded: Tensor, previous: Tensor) -> Tensor:
        gate = torch.sigmoid(self.remember(encoded) + self.forget(previous) + self.bias)
        return torch.lerp(encoded, previous, gate)


class ResidualCell(nn.Module):
    """`e + R(e) - F(p)`: remembering adds to the encoded prompt, forgetting takes from it.

    Both units start at zero, so that training starts from exactly vanilla prompt tuning.
    """

    def __init__(self, hidden_size: int, rank: int | None):
        super().__init__()
        self.remember = Unit(hidden_size, rank, zero=True)
        self.forget = Unit(hidden_size, rank, zero=True)

    def forward(self, encoded: Tensor, previous: Tensor) -> Tensor:
        return encoded + self.remember(encoded) - self.forget(previous)


CELLS: dict[str, type[nn.Module]] = {
    "recurrent": RecurrentCell,
    "gated": GatedCell,
    "residual": ResidualCell,
}
