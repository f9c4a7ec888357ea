"""Gradients of what is trained: against float64, against finite differences, and with recomputation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpc_dist.adapter import GraftedEncoder
from gpc_dist.adapter.lane import Adapter

from .encoders import FAMILIES, L, batch_for, tiny
from .grafts import METHODS, gradients, grafted, options, read_of, trained
from .reference import Weights, bert, cell_rule, prompt_made_of, t5

Loss = Callable[[Weights], Tensor]


def loss_in_float64(family: str, encoder: nn.Module, adapter: Adapter, batch: dict[str, Tensor]) -> Loss:
    """The loss of `grafts.gradients` as a function of the adapter's tensors, in float64 and plain PyTorch."""
    frozen = {n: t.double() if t.is_floating_point() else t for n, t in encoder.state_dict().items()}
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def loss(w: Weights) -> Tensor:
        rule, start = cell_rule(adapter, mask, w), prompt_made_of(w["prompt.start"], w)
        if family == "bert":
            types = batch["token_type_ids"]
            states = bert(frozen, start, ids, mask, types, rule, first=adapter.first_layer)
        else:
            states = t5(frozen, start, ids, mask, rule, first=adapter.first_layer)
        read = read_of(states, adapter.config)
        there = torch.ones(read.shape[:2]) if adapter.config.pooling == "prompt" else mask
        pooled = (read * there[:, :, None]).sum(1) / there.sum(1, keepdim=True)
        outputs = pooled @ w["head.linear.weight"].T + w["head.linear.bias"]
        return (outputs * torch.linspace(-1, 1, outputs.numel(), dtype=torch.float64).view_as(outputs)).sum()

    return loss


def in_float64(adapter: Adapter) -> Weights:
    return {n: p.detach().double() for n, p in adapter.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_gradients_equal_those_of_a_float64_recomputation(family: str, method: str) -> None:
    encoder, batch = tiny(family), batch_for(family)
    graft = grafted(encoder, options(method))
    weights = {n: w.requires_grad_() for n, w in in_float64(graft.adapter).items()}
    loss_in_float64(family, encoder, graft.adapter, batch)(weights).backward()
    found = gradients(graft, batch)
    assert found.keys() == weights.keys()
    for name, gradient in found.items():
        expected = weights[name].grad
        assert expected is not None
        scale = float(expected.abs().max())
        assert scale > 0, f"{name} takes no part in the loss"
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=2e-6 * scale, msg=name)


@pytest.mark.parametrize("method", ["recurrent", "gated", "low-rank", "prompt-scale", "deep-prompt"])
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_gradients_equal_finite_differences(family: str, method: str) -> None:
    encoder, batch = tiny(family), batch_for(family)
    graft = grafted(encoder, options(method))
    loss, weights = loss_in_float64(family, encoder, graft.adapter, batch), in_float64(graft.adapter)
    step = 1e-5
    for name, gradient in gradients(graft, batch).items():
        entry = int(gradient.abs().argmax())
        value = weights[name].flatten()[entry].item()

        def loss_at(x: float, name: str = name, entry: int = entry) -> float:
            moved = weights[name].clone()
            moved.view(-1)[entry] = x
            return float(loss(weights | {name: moved}))

        difference = (loss_at(value + step) - loss_at(value - step)) / (2 * step)
        assert gradient.flatten()[entry].item() == pytest.approx(difference, rel=1e-5), name


@pytest.mark.parametrize("method", ["per-layer", "deep-prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_give_the_same_gradients_bit_for_bit(family: str, method: str) -> None:
    batch = batch_for(family)
    stored = gradients(grafted(family, options(method)), batch)
    graft = grafted(family, options(method))
    graft.checkpoint_activations()
    recomputed = gradients(graft, batch)
    assert stored.keys() == recomputed.keys() == trained(graft).keys()
    for name, gradient in stored.items():
        assert torch.equal(recomputed[name], gradient), name


class Calls:
    """Counts the calls of a module's `forward`."""

    def __init__(self, module: nn.Module):
        self.count, self.forward = 0, module.forward
        module.forward = self  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self.forward(*args, **kwargs)


def test_recomputation_runs_each_layer_again_and_the_cell_once() -> None:
    graft, batch = grafted("bert", options("residual")), batch_for("bert")
    layers, cell = [Calls(layer) for layer in graft.parts.layers], Calls(graft.adapter.cell[0])
    graft.checkpoint_activations()
    with torch.no_grad():
        graft(**batch)
    assert [layer.count for layer in layers] == [1] * L  # nothing to recompute without gradients
    gradients(graft, batch)
    assert [layer.count for layer in layers] == [3] * L
    assert cell.count == 2 * (L - 1)


def frozen_bytes(graft: GraftedEncoder) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in graft.encoder.parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_changes_the_adapter_and_nothing_else(method: str) -> None:
    graft, batch = grafted("bert", options(method)), batch_for("bert")
    frozen, before = frozen_bytes(graft), {n: p.detach().clone() for n, p in trained(graft).items()}
    optimizer = torch.optim.AdamW(graft.parameters(), lr=1e-2)
    graft(**batch).square().sum().backward()
    assert [n for n, p in graft.named_parameters() if p.grad is not None] == [
        f"lanes.0.{name}" for name in trained(graft)
    ]
    optimizer.step()
    assert frozen_bytes(graft) == frozen
    for name, parameter in trained(graft).items():
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("method", ["residual", "gated", "low-rank"])
def test_a_zero_start_lets_gradients_flow_to_the_cell(method: str) -> None:
    graft, batch = grafted("t5", options(method), draw=False), batch_for("t5")
    last = "1" if method == "low-rank" else "0"
    found = gradients(graft, batch)
    for unit in ("remember", "forget"):
        assert found[f"cell.0.{unit}.{last}.weight"].abs().max() > 0
