"""int8 matrices of a frozen encoder, for training where only the input of a product needs a gradient.

Quantisation is symmetric, with one scale for each output feature. The weight-only products of libraries (torchao,
quanto) are made for inference: in training, autograd keeps the dequantised matrices of all layers until the backward
pass, which takes more memory than no quantisation (`benchmarks/quantize.py`). The product here keeps the int8 matrix
and converts it again in the backward pass, so that one matrix at a time is in floating point.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpc_dist.encoder.skeleton import give_values

_LARGEST = 127


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
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, QuantizedLinear(child))


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
