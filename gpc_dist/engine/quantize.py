"""Frozen matrices at one byte a weight, for training where only the input of a product needs a gradient.

torchao quantises the matrices and holds them: int8, symmetric, one scale for each output feature. Its own product is
made for inference: run in training, autograd keeps the matrix as it was turned back into floating point until the
backward pass, of every layer at once, and more memory is held than without quantisation. The product here keeps the
int8 matrix and converts it again in the backward pass, so that one matrix at a time is in floating point.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from gpc_dist.engine.hardware import return_freed_memory
from gpc_dist.engine.skeleton import give_values
from gpc_dist.errors import UserError


def check_available() -> None:
    """Raises UserError if the library that `engine.quantize` needs is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise UserError(
            "engine.quantize 'int8' needs the quantize extra: pip install 'gpc-dist[quantize]', or set it to none"
        )


def quantize_layer(layer: nn.Module, kind: str) -> None:
    """Quantise the matrices of an encoder layer in place, on the device where they lie.

    Every `nn.Linear` in the layer becomes a `QuantizedLinear`; biases, norms and tables (T5's relative bias) stay as
    they are. Modules that layers share, as ALBERT's do, are quantised once. A matrix `[O, I]` of the layer then takes
    `O * I` bytes and 5 for each output feature: its float32 scale, and a zero point that torchao keeps.

    Args:
        layer: filled and frozen.
        kind: `int8`.

    Raises:
        UserError: torchao is not installed.
        ValueError: another kind.
    """
    if kind != "int8":
        raise ValueError(f"no quantisation '{kind}'")
    check_available()
    return_freed_memory()  # glibc would keep the floating-point matrices of every layer, and the products' copies
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, QuantizedLinear(child))


class QuantizedLinear(nn.Module):
    """A frozen `nn.Linear` whose matrix is int8; its input and output have the dtype that the matrix had.

    `weight` is torchao's `Int8Tensor` `[O, I]`, which still shows that dtype: what counts parameters, moves them or
    reads their dtype (T5's feed-forward layer does) sees an ordinary matrix.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        from torchao.quantization import Int8Tensor, PerRow

        # in the parameter's own place: the loader still refers to it, and would keep the floating-point matrix
        matrix: Any = linear.weight
        give_values(matrix, Int8Tensor.from_hp(matrix, PerRow()))
        self.weight = matrix
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """`[.., I]` -> `[.., O]`."""
        weight: Any = self.weight
        return _FrozenProduct.apply(x, weight.qdata, weight.scale, self.bias)  # type: ignore[no-any-return]


class _FrozenProduct(torch.autograd.Function):
    """`x (s * Q)^T + b` with the gradient of x alone. The scale acts on the output, which is smaller than Q."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(matrix, scale)
        product = nn.functional.linear(x, matrix.to(x.dtype)).mul_(scale.to(x.dtype).T)
        return product if bias is None else product.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        matrix, scale = ctx.saved_tensors
        scaled = gradient * scale.to(gradient.dtype).T
        return scaled @ matrix.to(gradient.dtype), None, None, None
