"""The cell: the rule that writes the next layer's prompt state.

Notation: `e` is the prompt that layer *l* encoded, `p` the prompt state that entered layer *l*; both
are `[B, P, H]`. The public text of arXiv 2304.05642 gives the mechanism (RNN-inspired, a
remembering unit on `e`, a forgetting unit on `p`, one module for all layers) but not its
equations; each class names its interpretation.

The options `adapter.cell_units` (a unit that is left out adds nothing), `adapter.cell_norm` and `adapter.cell_scale`
are this project's; the rules below are written without them. With a norm, `Cell(e, p)` is
`rms(e) Rule(e / rms(e), p / rms(p))`: if the states are scaled by a factor, so is the result, and the learning rate
that it needs does not depend on the scale of an encoder's hidden states. With a scale, the result of the rule is
rescaled to the rms of `e` or of the text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from gpc_dist.adapter.scale import normed, rescaled, rms
from gpc_dist.config import AdapterConfig

Start = Literal["zero", "identity"]


class Unit(nn.Sequential):
    """A linear map `[..., H] -> [..., H]` without bias, as one matrix or as a product of rank `rank`.

    Args:
        start: what it starts as: `zero`, the zero map (of a product only the second factor is zero, so that gradients
            flow), or `identity`. A product cannot be the identity; it starts as the projection onto a random subspace
            of its rank, enlarged so that a random state keeps its size.
    """

    def __init__(self, hidden_size: int, rank: int | None, start: Start):
        last = nn.Linear(rank or hidden_size, hidden_size, bias=False)
        factors = [last] if rank is None else [nn.Linear(hidden_size, rank, bias=False), last]
        super().__init__(*factors)
        if start == "zero":
            nn.init.zeros_(last.weight)
        elif rank is None:
            nn.init.eye_(last.weight)
        else:
            first = factors[0].weight
            nn.init.orthogonal_(first)
            with torch.no_grad():
                last.weight.copy_(first.T * max(1, hidden_size / rank) ** 0.5)


class Cell(nn.Module, ABC):
    """A remembering and a forgetting unit; the `rule` of each subclass combines them.

    Args:
        start: of both units, see `Unit`.
    """

    def __init__(self, hidden_size: int, config: AdapterConfig, start: Start):
        super().__init__()

        def unit() -> Unit:
            return Unit(hidden_size, config.cell_rank, start)

        self.norm = config.cell_norm
        self.scale = config.cell_scale
        self.remember = None if config.cell_units == "forget" else unit()
        self.forget = None if config.cell_units == "remember" else unit()

    def forward(self, encoded: Tensor, previous: Tensor, text_rms: Tensor | None = None) -> Tensor:
        """The next prompt state `[B, P, H]` from the encoded and the previous one.

        Args:
            text_rms: root mean square `[B, 1, 1]` of the result with `cell_scale: text`.
        """
        *states, size = self.read(encoded, previous)
        written = self.rule(*states)
        if self.scale == "prompt":
            return rescaled(written, size)
        if self.scale == "text":
            assert text_rms is not None
            return rescaled(written, text_rms)
        return written * size if self.norm else written

    def read(self, encoded: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`e` and `p` as inputs of the rule (divided by their rms with a norm), and `rms(e) [B, P, 1]`."""
        size = rms(encoded)
        return (encoded / size, normed(previous), size) if self.norm else (encoded, previous, size)

    @abstractmethod
    def rule(self, encoded: Tensor, previous: Tensor) -> Tensor:
        """The next prompt state, at the scale of the inputs."""

    def remembered(self, encoded: Tensor) -> Tensor | float:
        """`R(e)`; 0 without a remembering unit."""
        return 0.0 if self.remember is None else self.remember(encoded)

    def forgotten(self, previous: Tensor) -> Tensor | float:
        """`F(p)`; 0 without a forgetting unit."""
        return 0.0 if self.forget is None else self.forget(previous)


class RecurrentCell(Cell):
    """`tanh(R(e) + F(p) + b)`: interpretation as an Elman network.

    The result is bounded by 1 at any scale of the encoder's hidden states. Both units start at the identity, so that
    training starts from `tanh(e + p)`, and each prompt position keeps what tells it from the others. (Le et al. 2015,
    arXiv 1504.00941, start recurrent networks at the identity.) With units drawn at random the positions of a long
    prompt grew alike, and some runs learnt nothing (docs/method.md).
    """

    def __init__(self, hidden_size: int, config: AdapterConfig):
        super().__init__(hidden_size, config, start="identity")
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def rule(self, encoded: Tensor, previous: Tensor) -> Tensor:
        return torch.tanh(self.remembered(encoded) + self.forgotten(previous) + self.bias)


class GatedCell(Cell):
    """`f * p + (1 - f) * e` with `f = sigmoid(R(e) + F(p) + b)`: interpretation as a forget gate.

    For each feature, the gate mixes the encoded and the previous prompt. It starts nearly closed
    (`b = -4`, f is about 0.02): close to vanilla prompt tuning.
    """

    def __init__(self, hidden_size: int, config: AdapterConfig):
        super().__init__(hidden_size, config, start="zero")
        self.bias = nn.Parameter(torch.full((hidden_size,), -4.0))

    def rule(self, encoded: Tensor, previous: Tensor) -> Tensor:
        return torch.lerp(encoded, previous, self.gate(encoded, previous))

    def gate(self, encoded: Tensor, previous: Tensor) -> Tensor:
        """`f [B, P, H]`, from the inputs of the rule."""
        return torch.sigmoid(self.remembered(encoded) + self.forgotten(previous) + self.bias)


class ResidualCell(Cell):
    """`e + R(e) - F(p)`: remembering adds to the encoded prompt, forgetting subtracts from it.

    Both units start at zero, so that training starts exactly from vanilla prompt tuning.
    """

    def __init__(self, hidden_size: int, config: AdapterConfig):
        super().__init__(hidden_size, config, start="zero")

    def rule(self, encoded: Tensor, previous: Tensor) -> Tensor:
        return encoded + self.remembered(encoded) - self.forgotten(previous)


CELLS: dict[str, Callable[[int, AdapterConfig], Cell]] = {
    "recurrent": RecurrentCell,
    "gated": GatedCell,
    "residual": ResidualCell,
}
