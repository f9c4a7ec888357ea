"""int8 matrices of a frozen encoder, for training where only the input of a product needs a gradient.

Quantisation is symmetric: with one scale for each output feature where a rank has whole matrices, and for each 256
values of a shard, which ZeRO-3 cuts out of the flattened matrix. The weight-only products of libraries (torchao,
quanto) are made for inference: in training, autograd keeps the dequantised matrices of all layers until the backward
pass, which takes more memory than no quantisation (`benchmarks/quantize.py`). The product here keeps the int8 matrix
and converts it again in the backward pass, so that one matrix at a time is in floating point.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gpc_dist.encoder.skeleton import give_values
from gpc_dist.errors import UserError

_LARGEST = 127
SHARD_GROUP = 256
"""Values of a shard with a scale of their own."""


def quantize_layer(layer: nn.Module, kind: str) -> None:
    """Quantise the matrices of an encoder layer in place, on the device where they lie.

    Every `nn.Linear` in the layer becomes a `QuantizedLinear`; biases, norms and tables (T5's relative bias) stay as
    they are. Modules that layers share, as ALBERT's do, are quantised once. A matrix `[O, I]` of the layer then takes
    `O * I` bytes and 4 for each output feature, its float32 scale.

    Args:
        layer: filled and frozen.
        kind: `int8`.

    Raises:
        ValueError: another kind.
    """
    if kind != "int8":
        raise ValueError(f"no quantisation '{kind}'")
    for parent, name, linear in _linears(layer):
        setattr(parent, name, QuantizedLinear(linear))


def _linears(layer: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The `nn.Linear` in a layer: in which module, and under which name."""
    return [
        (parent, name, child)
        for parent in layer.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]


def shard_matrices(layers: Iterable[nn.Module], ranks: int) -> set[nn.Parameter]:
    """The matrices of layers whose shards are kept as int8: those of every `nn.Linear`.

    Raises:
        UserError: a shard of one of them, on so many ranks, is no multiple of the values that share a scale.
    """
    found: set[Any] = {linear.weight for layer in layers for _, _, linear in _linears(layer)}
    groups = math.gcd(*(matrix.numel() for matrix in found)) // SHARD_GROUP
    whole = all(matrix.numel() % SHARD_GROUP == 0 for matrix in found)
    if not whole or groups % ranks:
        fitting = [str(count) for count in range(1, 17) if groups % count == 0 and whole]
        raise UserError(
            f"engine.quantize int8 at stage 3 keeps a scale for each {SHARD_GROUP} values of a shard, and {ranks} "
            "ranks do not cut this encoder's matrices so: give "
            + (f"{', '.join(fitting)} ranks, or " if fitting else "")
            + "engine.quantize none"
        )
    return found


class ShardQuantizer:
    """int8 for the shards of ZeRO-3, as DeepSpeed asks for it: a scale, in the dtype of the weights, for each group of
    256 values."""

    def quantize(self, shard: Tensor) -> tuple[Tensor, Tensor]:
        """`[n]` -> int8 values `[n]` and scales `[n / 256]`."""
        groups = shard.detach().view(-1, SHARD_GROUP)
        tiny = torch.finfo(shard.dtype).tiny
        scales = (groups.abs().amax(dim=1).float() / _LARGEST).to(shard.dtype).clamp(min=tiny)
        values = (groups.float() / scales.float()[:, None]).round_().clamp_(-_LARGEST, _LARGEST)
        return values.to(torch.int8).view(-1), scales

    def dequantize(self, values: Tensor, scales: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """int8 values of some shards, one after the other, and their scales -> weights of the shape of the values."""
        groups = values.reshape(-1, SHARD_GROUP).to(scales.dtype)
        return groups.mul_(scales[:, None]).view(values.shape).to(dtype or scales.dtype)


class QuantizedLinear(nn.Module):
    """A frozen `nn.Linear` whose matrix is int8 `weight [O, I]` times float32 `scale [O]`; its output has the dtype
    of its input."""

    scale: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        matrix: Any = linear.weight
        with torch.no_grad():
            largest = matrix.abs().amax(dim=1).float()
            scale = largest.clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
            values = (matrix / scale[:, None]).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
        # in place, because the loader still refers to the parameter and would keep the floating-point matrix
        give_values(matrix, values)
        self.weight = matrix
        self.bias = linear.bias
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """`[.., I]` -> `[.., O]`."""
        return _FrozenProduct.apply(x, self.weight, self.scale, self.bias)  # type: ignore[no-any-return]


class _FrozenProduct(torch.autograd.Function):
    """`x (s * Q)^T + b` with a gradient for x alone. The scale acts on the output, which is smaller than Q."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(matrix, scale)
        product = nn.functional.linear(x, matrix.to(x.dtype)).mul_(scale.to(x.dtype))
        return product if bias is None else product.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        matrix, scale = ctx.saved_tensors
        scaled = gradient * scale.to(gradient.dtype)
        return scaled @ matrix.to(gradient.dtype), None, None, None
