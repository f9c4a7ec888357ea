"""An encoder built from its configuration alone, without its weights in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gpc_dist.adapter.families import EncoderParts, locate
from gpc_dist.adapter.pretrained import auto_class
from gpc_dist.encoder.attention import share_position_bias
from gpc_dist.encoder.fused import fuse_elementwise


def build_skeleton(model_config: Any, dtype: torch.dtype) -> EncoderParts:
    """The parts of `skeleton_model`."""
    return locate(skeleton_model(model_config, dtype))


def skeleton_model(model_config: Any, dtype: torch.dtype) -> Any:
    """The encoder (of an encoder-decoder, its encoder half), frozen and in eval mode, its parameters on the meta
    device. Buffers are real: they are small, and no checkpoint file holds them.

    Args:
        model_config: a configuration of `transformers`.
        dtype: of the floating-point parameters.
    """
    from gpc_dist.private.transformers import no_init_weights

    # without this, drawing initial values takes seconds even on the meta device
    with parameters_on_meta(), no_init_weights():
        model = auto_class(model_config).from_config(model_config, dtype=dtype)
    model.tie_weights()
    return freeze(model)


def freeze(model: Any) -> Any:
    """Remove the pooler of a model of `transformers`, freeze the rest and fuse its kernels, in place."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # reads the first position, which is a prompt's; nothing uses it
    fuse_elementwise(model)
    share_position_bias(model)
    return model.requires_grad_(False).eval()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Create parameters of modules on the meta device, without memory or initial values.

    `torch.device("meta")` would create buffers there too, whose values only the module's constructor knows.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # a parameter on the meta device is being tied to another module, and must stay the same object
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@dataclass(frozen=True)
class Drawn:
    """Random values of a weight, drawn when they are asked for: for benchmarks, where only the shape matters. They
    can stand where a place in a file would (`tensors.Stored`).

    Matrices are scaled by their input width, so that states neither vanish nor overflow in bf16.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float
    """Value of all elements of a vector."""
    seed: int

    def mapped(self) -> torch.Tensor:
        values = torch.empty(self.shape, dtype=self.dtype)
        self.read(0, values.view(-1))
        return values

    def read(self, start: int, target: torch.Tensor) -> None:
        """Draw the elements from `start` into `target`, on its device. Ranks that ask for the same get the same."""
        if len(self.shape) > 1:
            generator = torch.Generator(target.device).manual_seed(self.seed + start)
            target.normal_(std=self.shape[-1] ** -0.5, generator=generator)
        else:
            target.fill_(self.fill)


def drawn(parts: EncoderParts) -> dict[nn.Parameter, Drawn]:
    """Random values for each weight of a skeleton."""
    modules = nn.ModuleList([parts.encoder, parts.token_embeddings])
    return {
        parameter: Drawn(
            tuple(parameter.shape),
            parameter.dtype,
            0.0 if name.endswith("bias") else 1.0,
            number,
        )
        for number, (name, parameter) in enumerate(modules.named_parameters())
    }


@torch.no_grad()
def fill_random(parts: EncoderParts, device: torch.device) -> None:
    """Give a skeleton the weights of `drawn` on `device`, in place."""
    for parameter, place in drawn(parts).items():
        values = torch.empty(place.shape, dtype=place.dtype, device=device)
        place.read(0, values.view(-1))
        give_values(parameter, values)
    parts.encoder.to(device)


def give_values(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Give `parameter` these values and freeze it, wherever it is used."""
    torch.utils.swap_tensors(parameter, nn.Parameter(values, requires_grad=False))
