"""Private parts of transformers: finding files, making models, ALBERT's layers, and forwards of T5 to be replaced."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from gpc_dist.private import checked, require
from gpc_dist.private.torch import copy_without_hooks

with checked("transformers"):
    from transformers import AutoModel, PreTrainedModel
    from transformers.activations import NewGELUActivation
    from transformers.initialization import no_init_weights
    from transformers.models.auto.auto_factory import _get_model_class
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
    from transformers.models.mt5.modeling_mt5 import MT5Attention, MT5LayerNorm
    from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm
    from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm
    from transformers.utils import cached_file

    require(AutoModel, "_model_mapping")
    require(PreTrainedModel, "_keys_to_ignore_on_load_unexpected")
    for _attention in (T5Attention, MT5Attention):
        require(_attention, "compute_bias")
        if (
            not {"hidden_states", "mask", "position_bias"}
            <= inspect.signature(_attention.forward).parameters.keys()
        ):
            raise AttributeError(f"{_attention.__name__}.forward takes other arguments")

__all__ = [
    "find_file",
    "fit_stack",
    "has_encoder_class",
    "ignored_keys",
    "leave_out_bottom",
    "model_class",
    "new_gelus",
    "no_init_weights",
    "replace_t5_attention",
    "replace_t5_norms",
    "share_bottom_bias",
    "unroll_albert",
]


def find_file(path: str, name: str, revision: str | None) -> Path | None:
    """A file of a folder or a Hub id, fetched if need be; None if it is not there."""
    found = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def has_encoder_class(family: str) -> bool:
    """Whether `AutoModelForTextEncoding` makes the encoder half of a family's encoder-decoder."""
    return family in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES


def model_class(auto: Any, model_config: Any) -> Any:
    """The class that an auto class, such as `AutoModel`, takes for a configuration."""
    return _get_model_class(model_config, auto._model_mapping)


def ignored_keys(model: nn.Module) -> list[str]:
    """Patterns of names in a checkpoint that a model knows of and has no use for."""
    return list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])


def unroll_albert(encoder: Any) -> None:
    """Give each of ALBERT's L layer calls a module of its own, sharing the group's weights, in place."""
    stack = encoder.encoder
    groups, count = stack.albert_layer_groups, encoder.config.num_hidden_layers
    if len(groups) == count:
        return
    stack.albert_layer_groups = nn.ModuleList(
        copy_without_hooks(groups[index * len(groups) // count]) for index in range(count)
    )
    # its forward finds the layer from the number of groups; the shared configuration stays as it is
    stack.config = copy.copy(stack.config)
    stack.config.num_hidden_groups = count


def fit_stack(stack: Any, count: int) -> None:
    """Let the owner of a list of layers run `count` of them, in place; most run all that are in the list."""
    if hasattr(stack, "albert_layer_groups"):
        stack.config = copy.copy(stack.config)
        stack.config.num_hidden_groups = stack.config.num_hidden_layers = count


def share_bottom_bias(bottom: nn.Module, layer: nn.Module) -> None:
    """Let a layer of a T5 compute the relative bias, which the bottom layer computes for all, if it is given none. The
    table becomes a part of both."""
    for old, new in zip(bottom.modules(), layer.modules(), strict=False):
        if getattr(old, "has_relative_attention_bias", False) and not new.has_relative_attention_bias:
            new.relative_attention_bias = old.relative_attention_bias
            new.has_relative_attention_bias = True  # type: ignore[assignment]


def leave_out_bottom(stack: Any) -> None:
    """Let the owner of a list of layers leave out what follows the bottom layer alone, in place: DeBERTa's
    convolution."""
    if hasattr(stack, "conv"):
        stack.conv = None


def new_gelus(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where a model has the tanh form of GELU, written operator by operator: parent module and name in it."""
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is NewGELUActivation
    ]


def replace_t5_norms(model: nn.Module, norm: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Let the norms of a T5, mT5 or umT5 whose weights are frozen run as `norm`, in place.

    Args:
        norm: root mean square norm of states over the last dimension, given the weight and an epsilon.
    """

    def forward(self: Any, states: Tensor) -> Tensor:
        if self.weight.requires_grad:
            return type(self).forward(self, states)
        return norm(states.to(self.weight.dtype), self.weight, self.variance_epsilon)

    for module in model.modules():
        if type(module) in (T5LayerNorm, MT5LayerNorm, UMT5LayerNorm):
            module.forward = MethodType(forward, module)


def replace_t5_attention(model: nn.Module, merge: Callable[[Tensor, Tensor | None, bool], Tensor]) -> None:
    """Let the self-attention of a T5 or mT5 encoder run through one fused kernel, in place.

    The first layer hands what `merge` makes to the others. umT5 has a bias of its own in every layer, so it has
    nothing to share.

    Args:
        merge: relative bias `[1, heads, S, S]` and padding mask to what is added to the scores, given whether the
            table of biases is trained.
    """

    def forward(
        self: Any,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor, None]:
        """`[R, S, H] -> [R, S, H]`; also the merged bias, for the next layer."""
        heads = (*hidden_states.shape[:2], -1, self.key_value_proj_dim)
        query, key, value = (
            project(hidden_states).view(heads).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        if position_bias is None:
            length = hidden_states.shape[1]
            bias = self.compute_bias(length, length, device=hidden_states.device).to(hidden_states.dtype)
            position_bias = merge(bias, mask, self.relative_attention_bias.weight.requires_grad)
        # T5 folds the usual scale into its query weights
        states = F.scaled_dot_product_attention(query, key, value, attn_mask=position_bias, scale=1.0)
        return self.o(states.transpose(1, 2).flatten(2)), position_bias, None

    for module in model.modules():
        if type(module) in (T5Attention, MT5Attention) and not module.is_decoder:
            module.forward = MethodType(forward, module)
