"""The adapter: prompt, cell and head, which are all the trained parameters. With method `fine-tuning` the
encoder becomes a part of it.

The place of an adapter in a running encoder is a *lane*; several lanes can share one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gpc_dist.adapter.cell import CELLS
from gpc_dist.adapter.head import Head, pooled
from gpc_dist.adapter.scale import text_rms
from gpc_dist.config import AdapterConfig
from gpc_dist.errors import UserError

PARTS = ("prompt", "cell", "head", "encoder")
"""The parts of an adapter. The first component of a parameter's name is its part."""


@dataclass(frozen=True)
class EncoderShape:
    """The sizes of an encoder that an adapter needs."""

    layers: int
    hidden_size: int
    embedding_size: int


@dataclass(frozen=True)
class Origin:
    """What an adapter started from, if not from `prompt_init` alone (see `transfer`)."""

    task: str
    """Of the other adapter."""
    weights_sha256: str
    """SHA-256 of its `adapter.safetensors`."""
    parts: list[str]
    """Of `PARTS`, those that were taken from it."""


class Prompt(nn.Module):
    """`start [P, E]` is put before the text, or `[P, H]` if it enters before layer k > 0; `deep [L-1-k, P, H]` are the
    fresh prompts of the layers after k (method `deep-prompt`).

    With `adapter.prompt_mlp` they are `x + MLP(x)` of what is trained, one MLP for all of them: the reparametrisation
    of prefix tuning (Li and Liang 2021, section 4.3) with the skip connection of residual prompt tuning (Razdaibiedina
    et al. 2023, section 3). Its last map starts at 0, so it starts as the prompts without it.

    Raises:
        UserError: one MLP is to serve prompts of two widths, E and H.
    """

    def __init__(self, config: AdapterConfig, shape: EncoderShape, first_layer: int):
        super().__init__()
        tokens, deep = config.prompt_tokens, config.method == "deep-prompt"
        width = shape.hidden_size if first_layer else shape.embedding_size
        self.start = nn.Parameter(torch.zeros(tokens, width))
        self.deep: nn.Parameter | None = None
        if deep:
            self.deep = nn.Parameter(torch.zeros(shape.layers - 1 - first_layer, tokens, shape.hidden_size))
            nn.init.normal_(self.deep, std=0.02)
        self.mlp: nn.Module | None = None
        if config.prompt_mlp is not None:
            if deep and width != shape.hidden_size:
                raise UserError(
                    f"adapter.prompt_mlp: the encoder's embeddings have width {width} and its states "
                    f"{shape.hidden_size}, and one MLP cannot serve both: give an adapter.first_layer above 0"
                )
            last = nn.Linear(config.prompt_mlp, width)
            self.mlp = nn.Sequential(nn.Linear(width, config.prompt_mlp), nn.Tanh(), last)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def made(self, trained: Tensor) -> Tensor:
        """The prompt `[..., P, E or H]` that is made of trained vectors."""
        return trained if self.mlp is None else trained + self.mlp(trained)

    @property
    def first(self) -> Tensor:
        """The prompt that enters layer k, `[P, E or H]`."""
        return self.made(self.start)


class Adapter(nn.Module):
    """One prompt, cell and head, in float32.

    Args:
        config: method, cell, sizes.
        shape: sizes of its encoder.
        outputs: outputs of the head.
        seed: seed of the starting values of head, cell and deep prompts. Those of the prompt need the
            encoder's embeddings: see `prompt.starting_prompt`.

    Raises:
        UserError: nothing reads the prompt: `first_layer` or `cell_layers` has a layer that the encoder does not have,
            or `cell_layers` one below `first_layer`, or the last layer although the head does not read the prompt.
    """

    def __init__(self, config: AdapterConfig, shape: EncoderShape, outputs: int, seed: int = 0):
        super().__init__()
        self.config = config
        self.shape = shape
        self.outputs = outputs
        self.origin: Origin | None = None
        """The adapter that it started from, if it did."""
        self.first_layer = config.entry_layer(shape.layers)
        """k: the first layer that depends on the adapter; L if none does."""
        self.read_from = config.read_from(shape.layers)
        """The first layer whose incoming states the head reads; L if it reads the last ones alone."""
        self.pooling: Literal["mean", "first"] = "first" if config.pooling == "first" else "mean"
        """How the head pools the states that it reads."""
        method = config.method
        most = shape.layers - 1 if config.has_prompt else shape.layers
        chosen = self.first_layer if config.has_prompt else self.read_from
        if chosen > most:
            raise UserError(
                f"adapter.first_layer: there is no layer {chosen}: the encoder has {shape.layers} layers, "
                f"give one of 0 to {most}"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mixed = shape.layers - self.read_from + 1 if config.head_layers == "mix" else None
            # first, so that it starts alike in all methods
            head = Head(shape.hidden_size, outputs, mixed, config.head_hidden)
            self.prompt = None
            if config.has_prompt:
                self.prompt = Prompt(config, shape, self.first_layer)
            self.cell = None
            self.cell_layers: Sequence[int] = ()
            """Layers after which a cell acts."""
            if method == "gpc":
                self.cell_layers = _cell_layers(config, self.first_layer, shape.layers)
                count = len(self.cell_layers) if config.cell_per_layer else 1
                make = CELLS[config.cell]
                self.cell = nn.ModuleList([make(shape.hidden_size, config) for _ in range(count)])
            self.head = head
            self.encoder: nn.ModuleDict | None = None

    def take_encoder(self, body: nn.Module, token_embeddings: nn.Module) -> None:
        """Make an encoder a part of this adapter, to train, save and load it (`fine-tuning`)."""
        self.encoder = nn.ModuleDict({"embeddings": token_embeddings, "body": body})

    @property
    def prompt_tokens(self) -> int:
        """P; 0 for a method without a prompt."""
        return 0 if self.prompt is None else self.config.prompt_tokens

    def cell_after(self, layer: int) -> nn.Module | None:
        """The cell that acts after layer `layer`, 0 to L-1; None if none does."""
        if self.cell is None or layer not in self.cell_layers:
            return None
        return self.cell[self.cell_layers.index(layer) if self.config.cell_per_layer else 0]

    def rewrites_after(self, layer: int) -> bool:
        """Whether the prompt state is replaced after this layer."""
        return self._fresh_after(layer) or self.cell_after(layer) is not None

    def _fresh_after(self, layer: int) -> bool:
        """Whether the next layer gets a fresh prompt."""
        return self.config.method == "deep-prompt" and layer < self.shape.layers - 1

    def rewriting_parameters(self, layer: int) -> list[nn.Parameter]:
        """The parameters that `next_prompt` uses after this layer."""
        if (cell := self.cell_after(layer)) is not None:
            return list(cell.parameters())
        if self._fresh_after(layer):
            assert self.prompt is not None
            return [each for name, each in self.prompt.named_parameters() if name != "start"]
        return []

    def start(self, rows: int) -> Tensor:
        """The prompt to put before the text of `rows` rows: `[rows, P, E]`."""
        assert self.prompt is not None
        return self.prompt.first.expand(rows, -1, -1)

    def pooled(self, text: Tensor, attention_mask: Tensor) -> Tensor:
        """States of the text `[R, T, H]` as the head pools them, float32 `[R, H]`."""
        return pooled(text, attention_mask, self.pooling)

    def read_out(self, states: Tensor, attention_mask: Tensor, earlier: Sequence[Tensor] = ()) -> Tensor:
        """Outputs of the head, float32 `[R, outputs]`.

        Args:
            states: output of the last layer, `[R, P+T, H]`.
            attention_mask: mask of the text, `[R, T]`.
            earlier: pooled states that entered layer `read_from` and each later one.
        """
        if self.config.reads_prompt:
            prompt = states[:, : self.prompt_tokens]
            how: Literal["mean", "first"] = "first" if self.config.pooling == "prompt-first" else "mean"
            return self.head([pooled(prompt, attention_mask.new_ones(prompt.shape[:2]), how)])
        return self.head([*earlier, self.pooled(states[:, self.prompt_tokens :], attention_mask)])

    def next_prompt(
        self, layer: int, encoded: Tensor, previous: Tensor, text: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """Prompt state that enters layer `layer + 1`, or the head.

        Args:
            layer: index of the layer that has just run, 0 to L-1.
            encoded: `e_l [B, P, H]`, the prompt positions of the layer's output.
            previous: `p_l [B, P, H]`, the prompt positions of the layer's input.
            text: the text positions of the layer's output, `[B, T, H]`; only for its rms, with `cell_scale: text`.
            attention_mask: mask of the text, `[B, T]`.

        Returns:
            `p_{l+1} [B, P, H]` in the dtype of `encoded`; computed in the adapter's own dtype.
        """
        if (cell := self.cell_after(layer)) is not None:
            dtype = next(cell.parameters()).dtype
            scaled = self.config.cell_scale == "text"
            size = text_rms(text, attention_mask).to(dtype) if scaled else None
            return cell(encoded.to(dtype), previous.to(dtype), size).to(encoded.dtype)
        if self._fresh_after(layer):
            assert self.prompt is not None
            assert self.prompt.deep is not None
            fresh = self.prompt.made(self.prompt.deep[layer - self.first_layer])
            return fresh.to(encoded.dtype).expand(len(encoded), -1, -1)
        return encoded


def _cell_layers(config: AdapterConfig, first_layer: int, layers: int) -> Sequence[int]:
    """The layers after which the cell acts, of the encoder's `layers`."""
    # only a head that pools the prompt reads what is written after the last layer
    last = layers - (1 if config.reads_prompt else 2)
    if first_layer > max(last, 0):
        raise UserError(
            f"adapter.first_layer {first_layer} leaves no layer after which a cell's prompt would be read: the encoder "
            f"has {layers} layers; give at most {last}, or adapter.method prompt-tuning"
        )
    if config.cell_layers is None:
        return range(first_layer, last + 1)
    if wrong := [layer for layer in config.cell_layers if not first_layer <= layer <= last]:
        raise UserError(
            f"adapter.cell_layers: nothing reads a prompt written after layer {wrong[0]}: the encoder "
            f"has {layers} layers, give some of {first_layer} to {last}"
        )
    return config.cell_layers
