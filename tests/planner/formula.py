"""FLOPs of a pass by formula, the independent reference for those that the dry run counts.

A product with a matrix of N weights takes 2 N FLOPs a token forward, 2 N backward for the gradient of its input, and
2 N more for that of the weights if they are trained (Kaplan et al. 2020, section 2.1). Attention adds two products of
`[S, A] x [A, S]` per row and layer in the forward pass (A: width of all heads) and four in the backward pass.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.models.modernbert.modeling_modernbert import ModernBertRotaryEmbedding

from gpc_dist.adapter.families import EncoderParts


@dataclass(frozen=True)
class Flops:
    forward: float
    backward: float


def linear_weights(module: nn.Module) -> int:
    """Weights of all linear layers inside, as often as they are run."""
    return sum(
        m.weight.numel() for _, m in module.named_modules(remove_duplicate=False) if type(m) is nn.Linear
    )


def attention_width(model_config: Any) -> int:
    """A: heads times the size of a head."""
    heads = model_config.num_attention_heads
    return heads * (getattr(model_config, "d_kv", None) or model_config.hidden_size // heads)


def layers_flops(parts: EncoderParts, model_config: Any, positions: int, rows: int = 1) -> Flops:
    """Of the L layers, for rows of `positions` = P+T."""
    matrices = 2.0 * linear_weights(parts.layers) * positions
    scores = 4.0 * len(parts.layers) * attention_width(model_config) * positions**2
    return Flops(rows * (matrices + scores), rows * (matrices + 2 * scores))


def trained_flops(weights: int, positions: int, rows: int = 1) -> Flops:
    """Of trained matrices at `positions` of each row."""
    return Flops(2.0 * weights * positions * rows, 4.0 * weights * positions * rows)


def deberta_flops(model_config: Any, positions: int, rows: int = 1) -> Flops:
    """What DeBERTa's rows add: in each layer two products with the relative positions, which are frozen and so have no
    gradient, and one convolution."""
    relative = 4.0 * model_config.num_hidden_layers * _relative(model_config) * model_config.hidden_size
    convolution = 2.0 * model_config.conv_kernel_size * model_config.hidden_size**2
    added = rows * positions * (relative + convolution)
    return Flops(added, added)


def deberta_projections(model_config: Any) -> float:
    """Forward FLOPs of its relative positions, projected twice in each layer and once for all rows."""
    return 4.0 * model_config.num_hidden_layers * _relative(model_config) * model_config.hidden_size**2


def modernbert_angles(model_config: Any, positions: int) -> float:
    """Forward FLOPs of its rotary angles, once for all rows: up to 5.17 at least, transformers has frequencies times
    positions as a matrix product for each of its two kinds of layers, 5.23 multiplies them."""
    if "@ position_ids" not in inspect.getsource(ModernBertRotaryEmbedding.forward):
        return 0.0
    head_size = model_config.hidden_size // model_config.num_attention_heads
    return 2 * 2.0 * (head_size // 2) * positions


def _relative(model_config: Any) -> int:
    return 2 * model_config.position_buckets
