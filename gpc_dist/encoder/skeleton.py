"""An encoder from its configuration alone: every module in place, not one weight in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gpc_dist.adapter.families import EncoderParts, locate
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
    from transformers.initialization import no_init_weights

    # initial values of parameters on the meta device would still take seconds to not be drawn
    with parameters_on_meta(), no_init_weights():
        model = auto_class(model_config).from_config(model_config, dtype=dtype)
    model.tie_weights()
    return freeze(model)


def auto_class(model_config: Any) -> Any:
    """The class of `transformers` that makes an encoder; of an encoder-decoder, its encoder half only."""
    from transformers import AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

    halves = model_config.model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
    return AutoModelForTextEncoding if halves else AutoModel


def freeze(model: Any) -> Any:
    """Take what nothing uses off a model of `transformers`, freeze the rest, and let it run in fewer kernels."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # reads the first position, which is a prompt's; nothing uses it
    fuse_elementwise(model)
    share_position_bias(model)
    return model.requires_grad_(False).eval()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside get their parameters on the meta device, at no cost for size or initial values.

    `torch.device("meta")` would take the buffers there too, and their values are made nowhere else.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # one that is there already is being tied to another module, and must stay the same
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@torch.no_grad()
def fill_random(parts: EncoderParts, device: torch.device, seed: int = 0) -> None:
    """Give a skeleton random weights on `device`, in place: for benchmarks, where only the shape matters.

    Matrices are scaled by their input width, so that states neither vanish nor overflow in bf16.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for module in nn.ModuleList([parts.encoder, parts.token_embeddings]).modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type != "meta":
                continue
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            if parameter.dim() > 1:
                values.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
            else:
                values.fill_(0.0 if name == "bias" else 1.0)
            give_values(parameter, values)
    parts.encoder.to(device)


def give_values(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Make `parameter`, wherever it is used, a frozen one with these values."""
    torch.utils.swap_tensors(parameter, nn.Parameter(values, requires_grad=False))
