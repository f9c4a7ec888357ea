"""What a step costs in floating-point operations, and how honest shares of a device's peak are formed.

A forward pass takes 2 FLOPs per weight and token. The encoder is frozen, so the backward pass computes
gradients of activations only: another 2, where full training takes 4 (Kaplan et al. 2020, section 2.1).
Attention adds two products of `[S, A] x [A, S]` per row and layer in the forward pass (A: width of all
heads) and four in the backward pass, none of which a frozen encoder saves.

MFU counts what the method needs (Chowdhery et al. 2022, appendix B): text and prompt tokens, no padding,
nothing twice. HFU counts what the hardware is made to do with activation checkpointing: the forward pass
of every layer once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpc_dist.adapter.families import EncoderParts


@dataclass(frozen=True)
class StepCost:
    """Floating-point operations of one optimizer step."""

    model: float
    """Needed by the method: the numerator of MFU."""
    recomputed: float
    """Forward passes run again by activation checkpointing; 0 without."""

    @property
    def hardware(self) -> float:
        """The numerator of HFU."""
        return self.model + self.recomputed


def layer_parameters(parts: EncoderParts) -> int:
    """N of the formula: weights of the layers that every token is multiplied with; no embeddings."""
    return sum(p.numel() for layer in parts.layers for p in layer.parameters() if p.dim() == 2)


def attention_width(model_config: Any) -> int:
    """A: heads times the size of a head."""
    heads = model_config.num_attention_heads
    size = getattr(model_config, "d_kv", None) or model_config.hidden_size // heads
    return heads * size


def step_cost(
    layer_parameters: int, layers: int, attention_width: int, lengths: Sequence[int], recompute: bool
) -> StepCost:
    """FLOPs of a step over rows of these lengths (prompt and text tokens, no padding)."""
    tokens = float(sum(lengths))
    squares = float(sum(n * n for n in lengths))
    forward = 2.0 * layer_parameters * tokens + 4.0 * layers * attention_width * squares
    backward = 2.0 * layer_parameters * tokens + 8.0 * layers * attention_width * squares
    return StepCost(model=forward + backward, recomputed=forward if recompute else 0.0)
