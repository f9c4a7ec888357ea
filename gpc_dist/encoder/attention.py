"""Fast attention for a frozen encoder.

T5's attention runs in one fused kernel, and its relative position bias is computed once for a pass.
`transformers` hands the bias `[1, heads, S, S]` from layer to layer, and every layer merges it with the padding mask
into a new `[R, heads, S, S]` (S = P+T), or without SDPA keeps the scores of that size for the backward pass.
The encoder is frozen, so the merged bias is a constant: the first layer computes it, and the others get it in place
of the bias. In fine-tuning, operators that autograd can follow compute it, with gradients for the table of biases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_ALIGNMENT = 16
"""The memory-efficient CUDA kernel copies a mask whose rows do not start at multiples of 16 elements."""

_SHORT = 256
"""Tokens of a row up to which keeping the scores is faster than torch's fused bf16 kernel for CPUs, whose backward pass
takes 4 times as long at 22 tokens, 2 times at 128, the same at 256 (12 heads of 32, Zen 4)."""

_PLANNED = 320
"""Tokens of a row from which cuDNN's kernel is used. It plans each length before its first use, about 0.13 s. On an
H100, a GPC step of 32 rows in the T5-XL shape processes 9 % fewer tokens/s with it at 128 tokens, 1 % more at 192, 1 %
fewer at 256, 11 % more at 384, 18 % more at 532."""

_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def choose_kernels(layers: nn.ModuleList) -> None:
    """Let layers attend with the kernel that is fastest for the length of their rows (see `kernels`), in place."""
    for layer in layers:
        layer.forward = _choosing(layer.forward)


def kernels(states: Tensor) -> list[SDPBackend] | None:
    """What a layer may attend with, given its input `[R, S, H]` (S = P+T); None leaves the choice to torch.

    In bf16 on a CPU, short rows keep their scores `[R, heads, S, S]` for the backward pass. On a GPU, rows of
    another length at every step do not wait for cuDNN's plans.
    """
    length = states.shape[1]
    if states.is_cuda:
        return _WITHOUT_CUDNN if length < _PLANNED else None
    in_bf16 = states.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    return [SDPBackend.MATH] if in_bf16 and length <= _SHORT else None


def _choosing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(states: Tensor, *args: Any, **kwargs: Any) -> Any:
        chosen = kernels(states)
        if chosen is None:
            return forward(states, *args, **kwargs)
        with sdpa_kernel(chosen):
            return forward(states, *args, **kwargs)

    return run


def share_position_bias(model: nn.Module) -> None:
    """Let a frozen T5 or mT5 encoder run as above, in place; other encoders are not changed."""
    from gpc_dist.private.transformers import replace_t5_attention

    replace_t5_attention(model, _merge)


def _merge(bias: Tensor, mask: Tensor | None, trained: bool) -> Tensor:
    """Relative bias where a key may be seen, the lowest number where not: `[R or 1, heads, S, S]`."""
    return _with_gradients(bias, mask) if trained else _aligned(bias, mask)


def _with_gradients(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
    return bias + mask


@torch.no_grad()
def _aligned(bias: Tensor, mask: Tensor | None) -> Tensor:
    rows = 1 if mask is None else len(mask)
    heads, length = bias.shape[1:3]
    padded = -(-length // _ALIGNMENT) * _ALIGNMENT
    merged = bias.new_empty(rows, heads, length, padded)[..., :length]
    if mask is None:
        return merged.copy_(bias)
    if mask.dtype == torch.bool:
        return merged.copy_(bias).masked_fill_(~mask, torch.finfo(bias.dtype).min)
    return torch.add(bias, mask, out=merged)
