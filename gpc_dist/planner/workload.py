"""The planner's description of a run: sizes of the encoder and the adapter, and footprints of a pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from gpc_dist.adapter.families import EncoderParts
from gpc_dist.adapter.halves import LowerHalf, UpperHalf
from gpc_dist.adapter.lane import Adapter
from gpc_dist.encoder.skeleton import build_skeleton
from gpc_dist.errors import UserError
from gpc_dist.planner.dry_run import ModelSpec, Passes, measure_passes

_FLOAT = 4


@dataclass(frozen=True)
class Weights:
    """Parameters of a frozen encoder, counted; weights that layers share count once."""

    layers: int
    """L."""
    table: int
    """Of the token embeddings."""
    tensors: tuple[int, ...]
    """Sizes of all others."""
    layer: int
    """Of one layer, the largest."""
    matrices: int
    """Of the layers' matrices."""
    matrix_rows: int
    """Output features of these matrices, together."""
    largest_matrix: int
    element_bytes: int

    @property
    def total(self) -> int:
        """N."""
        return self.table + self.body

    @property
    def body(self) -> int:
        """All but the token embeddings."""
        return sum(self.tensors)

    def persistent(self, threshold: int) -> int:
        """Parameters in tensors that ZeRO-3 leaves whole on every rank."""
        return sum(size for size in self.tensors if size <= threshold)


@dataclass(frozen=True)
class Workload:
    """One optimizer step of a run, whatever it runs on."""

    weights: Weights
    adapter_tensors: tuple[int, ...]
    """Sizes of the trained tensors."""
    moments: int
    """Values that the optimizer keeps for each trained one."""
    passes: Passes
    tokens: int
    """T: text tokens of a row, at most."""
    prompt_tokens: int
    """P."""
    rows: int
    """Rows of a step over all ranks."""
    lower: Weights | None = None
    """Of the layers below the first that depends on the adapter, with the token table; `weights` are then of the
    others. They are on the devices while text states are computed."""
    states_row_bytes: int = 0
    """Of the text states of a row that enter the first layer, if they are cached."""

    @property
    def adapter(self) -> int:
        return sum(self.adapter_tensors)

    @property
    def row_tokens(self) -> int:
        return self.prompt_tokens + self.tokens


def count_weights(parts: EncoderParts, table: bool = True) -> Weights:
    """The sizes of an encoder or of its skeleton, or of a half of it.

    Args:
        table: whether the token embeddings are needed.
    """
    embeddings = next(parts.token_embeddings.parameters())
    others = [p for p in parts.encoder.parameters() if p is not embeddings]
    matrices = {p: p.shape for p in parts.layers.parameters() if p.dim() == 2}
    return Weights(
        layers=len(parts.layers),
        table=embeddings.numel() if table else 0,
        tensors=tuple(p.numel() for p in others),
        layer=max((_numel(layer) for layer in parts.layers), default=0),
        matrices=sum(shape.numel() for shape in matrices.values()),
        matrix_rows=sum(shape[0] for shape in matrices.values()),
        largest_matrix=max((shape.numel() for shape in matrices.values()), default=0),
        element_bytes=embeddings.element_size(),
    )


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def describe(model: ModelSpec, *, optimizer: str, max_length: int, rows: int) -> Workload:
    """The workload of an encoder and an adapter, from their configurations alone.

    Args:
        optimizer: `adamw` or `adafactor`.
        max_length: text tokens of a row; fewer if the encoder's positions leave less beside the prompt.
        rows: of a step, over all ranks.

    Raises:
        UserError: a family that cannot hold a prompt, or a prompt that leaves no room for text.
    """
    parts = build_skeleton(model.encoder, model.dtype)
    with torch.device("meta"):
        trained = Adapter(model.adapter, parts.shape, model.outputs)
    prompt = trained.prompt_tokens
    tokens = max_length if parts.max_positions is None else min(max_length, parts.max_positions - prompt)
    if tokens < 1:
        raise UserError(
            f"adapter.prompt_tokens {prompt} leaves none of the encoder's {parts.max_positions} positions for text: "
            "use a shorter prompt"
        )
    first, layers = model.first_layer, parts.shape.layers
    weights, lower, row_bytes = count_weights(parts), None, 0
    if first > 0 and model.states_given:
        if first < layers:
            lower = count_weights(LowerHalf(parts, first).parts)
            lower = replace(lower, layers=first)  # what stands for k is none
            weights = count_weights(UpperHalf(parts, first).parts, table=False)
            row_bytes = tokens * parts.shape.hidden_size * weights.element_bytes
        else:
            lower = weights
            weights = replace(
                weights, layers=0, table=0, tensors=(), layer=0, matrices=0, matrix_rows=0, largest_matrix=0
            )
            row_bytes = (layers - trained.read_from + 1) * parts.shape.hidden_size * _FLOAT
    return Workload(
        weights=weights,
        lower=lower,
        states_row_bytes=row_bytes,
        adapter_tensors=tuple(p.numel() for p in trained.parameters()),
        # Adafactor keeps a row and a column of a matrix
        moments=2 if optimizer == "adamw" else 0,
        passes=measure_passes(model, tokens),
        tokens=tokens,
        prompt_tokens=prompt,
        rows=rows,
    )
