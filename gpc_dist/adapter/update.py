"""Writes the next prompt state into a layer's output, in place.

Built from slices and concatenation, the update would copy the whole sequence `[B, P+T, H]` of every layer, once
in the forward pass and several times in the backward pass, to change P positions. As an autograd function of its
own it touches only those positions, in both passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Rule = Callable[[Tensor, Tensor], Tensor]
"""`(e_l, p_l) -> p_{l+1}`, all `[B, P, H]`."""


def read_prompt(states: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return a layer's input `h_l [B, P+T, H]` and a copy of its prompt positions `p_l [B, P, H]`."""
    return _ReadPrompt.apply(states, tokens)  # type: ignore[return-value]


def write_prompt(rule: Rule, encoded: Tensor, previous: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Replace the prompt positions of a layer's output by `rule(encoded prompt, previous prompt)`.

    Args:
        encoded: the layer's output `[B, P+T, H]`, changed in place.
        previous: `p_l [B, P, H]`, the prompt that entered the layer.
        parameters: the trained parameters that `rule` uses.

    Returns:
        `h_{l+1} [B, P+T, H]`, which is `encoded`.
    """
    return _WritePrompt.apply(rule, torch.is_grad_enabled(), encoded, previous, *parameters)  # type: ignore[return-value]


# Both backward passes change their incoming gradient in place. A layer's input is read by its residual branch and
# by its sub-layers, so that gradient is a new tensor, the sum of theirs, which nothing else uses.


class _ReadPrompt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        return states.view_as(states), states[:, :tokens].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, states: Tensor, prompt: Tensor) -> tuple[Tensor, None]:
        states[:, : prompt.shape[1]] += prompt
        return states, None


class _WritePrompt(torch.autograd.Function):
    """Runs the rule as a small graph of its own, and differentiates this graph in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, rule: Rule, needs_grad: bool, encoded: Tensor, previous: Tensor, *parameters: Tensor
    ) -> Tensor:
        tokens = previous.shape[1]
        inputs = [encoded[:, :tokens].clone(), previous.detach()]
        with torch.set_grad_enabled(needs_grad):
            for tensor in inputs:
                tensor.requires_grad_(needs_grad)
            written = rule(*inputs)
        encoded[:, :tokens] = written.detach()
        ctx.mark_dirty(encoded)
        ctx.graph = (written, (*inputs, *parameters)) if needs_grad else None
        return encoded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, states: Tensor) -> tuple[Any, ...]:
        written, inputs = ctx.graph
        prompt = states[:, : written.shape[1]]
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        # retained, because a caller may retain the whole graph for a second backward pass
        found = torch.autograd.grad(written, wanted, prompt.clone(), retain_graph=True, allow_unused=True)
        gradients = dict(zip(map(id, wanted), found, strict=True))
        encoded, *others = (gradients.get(id(tensor)) for tensor in inputs)
        prompt.copy_(torch.zeros_like(prompt) if encoded is None else encoded)
        return None, None, states, *others
