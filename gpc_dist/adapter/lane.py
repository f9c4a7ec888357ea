"""The adapter: prompt, cell and head; what is trained, and all that is trained.

An adapter's place in a running encoder is a *lane*; several lanes can share one batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpc_dist.adapter.cell import CELLS
from gpc_dist.adapter.head import Head
from gpc_dist.config import AdapterConfig

PARTS = ("prompt", "cell", "head")
"""The parts of an adapter, which may have learning rates of their own. The first component of a
parameter's name is its part."""


@dataclass(frozen=True)
class EncoderShape:
    """What an adapter must know of its encoder."""

    layers: int
    hidden_size: int
    embedding_size: int


class Prompt(nn.Module):
    """`start [P, E]` stands before the text; `deep [L-1, P, H]` are the fresh prompts of the later layers
    (method `deep-prompt`)."""

    def __init__(self, tokens: int, shape: EncoderShape, deep: bool):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(tokens, shape.embedding_size))
        self.deep = nn.Parameter(torch.zeros(shape.layers - 1, tokens, shape.hidden_size)) if deep else None


class Adapter(nn.Module):
    """One prompt, cell and head, in float32.

    Args:
        config: method, cell, sizes.
        shape: of the encoder it is made for.
        outputs: outputs of the head.
        seed: of the head's, the cell's and the deep prompts' starting values. The prompt's own start needs
            the encoder's embeddings: see `prompt.starting_prompt`.
    """

    def __init__(self, config: AdapterConfig, shape: EncoderShape, outputs: int, seed: int = 0):
        super().__init__()
        self.config = config
        self.shape = shape
        self.outputs = outputs
        method = config.method
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = Head(shape.hidden_size, outputs, config.pooling)  # first: the same for every method
            self.prompt = None
            if method != "linear-probe":
                self.prompt = Prompt(config.prompt_tokens, shape, deep=method == "deep-prompt")
            self.cell = None
            if method == "gpc":
                make = CELLS[config.cell]
                count = shape.layers - 1 if config.cell_per_layer else 1
                self.cell = nn.ModuleList([make(shape.hidden_size, config.cell_rank) for _ in range(count)])
            self.head = head
            if self.prompt is not None and self.prompt.deep is not None:
                nn.init.normal_(self.prompt.deep, std=0.02)

    @property
    def prompt_tokens(self) -> int:
        """P; 0 for the linear probe."""
        return 0 if self.prompt is None else self.config.prompt_tokens

    @property
    def rewrites_prompt(self) -> bool:
        """Whether the prompt state is replaced between layers."""
        return self.config.method in ("gpc", "deep-prompt")

    def rewriting_parameters(self, layer: int) -> list[nn.Parameter]:
        """The parameters that `next_prompt` uses after this layer."""
        if self.cell is not None:
            return list(self.cell[layer if self.config.cell_per_layer else 0].parameters())
        if self.prompt is not None and self.prompt.deep is not None:
            return [self.prompt.deep]
        return []

    def start(self, rows: int) -> Tensor:
        """The prompt that stands before the text of `rows` rows: `[rows, P, E]`."""
        assert self.prompt is not None
        return self.prompt.start.expand(rows, -1, -1)

    def next_prompt(self, layer: int, encoded: Tensor, previous: Tensor) -> Tensor:
        """Prompt state that enters layer `layer + 1`.

        Args:
            layer: index of the layer that has just run, 0 to L-2.
            encoded: `e_l [B, P, H]`, the prompt positions of the layer's output.
            previous: `p_l [B, P, H]`, the prompt positions of the layer's input.

        Returns:
            `p_{l+1} [B, P, H]` in the dtype of `encoded`; computed in the adapter's own dtype.
        """
        if self.cell is not None:
            cell = self.cell[layer if self.config.cell_per_layer else 0]
            dtype = next(cell.parameters()).dtype
            return cell(encoded.to(dtype), previous.to(dtype)).to(encoded.dtype)
        if self.prompt is not None and self.prompt.deep is not None:
            return self.prompt.deep[layer].to(encoded.dtype).expand(len(encoded), -1, -1)
        return encoded
