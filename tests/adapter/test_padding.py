"""A row's result depends on its own text alone: not on padding, not on the other rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpc_dist.adapter.head import Head, pooled

from .encoders import FAMILIES, P, batch_for, tiny
from .grafts import grafted, options, read_states
from .reference import cell_rule, run_layers, with_prompt

METHODS = ["gated", "text-scale", "deep-prompt"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_on_the_right_does_not_change_a_row(family: str, method: str) -> None:
    graft, batch = grafted(family, options(method)), batch_for(family, lengths=(11, 7, 3))
    together = graft(**batch)
    for row, length in enumerate((11, 7, 3)):
        alone = graft(**{name: x[row : row + 1, :length] for name, x in batch.items()})
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    wider = {name: nn.functional.pad(x, (0, 30)) for name, x in batch.items()}
    torch.testing.assert_close(graft(**wider), together, rtol=1e-5, atol=1e-5)
    other_tokens = torch.where(wider["attention_mask"] == 1, wider["input_ids"], 77)
    torch.testing.assert_close(graft(**wider | {"input_ids": other_tokens}), together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_may_stand_in_any_order(family: str) -> None:
    graft, batch = grafted(family, options("recurrent")), batch_for(family, lengths=(11, 7, 3, 9))
    order = torch.tensor([2, 0, 3, 1])
    shuffled = graft(**{name: x[order] for name, x in batch.items()})
    torch.testing.assert_close(shuffled, graft(**batch)[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert", "roberta", "t5"])
@torch.no_grad()
def test_masks_of_any_type_and_no_mask_at_all(family: str) -> None:
    graft, batch = grafted(family, options("residual")), batch_for(family)
    mask = batch["attention_mask"]
    for dtype in (torch.bool, torch.int32, torch.float32):
        assert torch.equal(graft(**batch | {"attention_mask": mask.to(dtype)}), graft(**batch)), dtype
    full = {name: x for name, x in batch.items() if name != "attention_mask"}
    assert torch.equal(graft(**full), graft(**batch | {"attention_mask": torch.ones_like(mask)}))


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_head_reads_no_prompt_position_and_no_padding(family: str, pooling: str) -> None:
    graft, batch = grafted(family, options("residual", pooling=pooling)), batch_for(family)
    before = graft(**batch)

    def spoil(_: nn.Module, __: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        states = states.clone()
        states[:, :P] = torch.nan
        states[:, P:][batch["attention_mask"] == 0] = torch.nan
        return (states, *output[1:]) if isinstance(output, tuple) else states

    graft.parts.layers[-1].register_forward_hook(spoil)
    assert torch.equal(graft(**batch), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["prompt-scale", "deep-prompt", "prompt-tuning"])
@torch.no_grad()
def test_a_head_that_pools_the_prompt_reads_the_mean_of_its_last_states(family: str, method: str) -> None:
    graft, batch = grafted(family, options(method, pooling="prompt")), batch_for(family)
    outputs = graft(**batch)
    inputs = with_prompt(tiny(family), graft.adapter.prompt.start, batch)
    states = run_layers(tiny(family), inputs, P, cell_rule(graft.adapter, batch["attention_mask"]))
    expected = graft.adapter.head.linear(states[:, :P].mean(1))
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["gpc", "linear-probe"])
@torch.no_grad()
def test_a_head_that_pools_the_first_token_reads_its_state_alone(method: str) -> None:
    graft, batch = grafted("bert", options("gated", pooling="first", method=method)), batch_for("bert")
    expected = graft.adapter.head.linear(read_states(graft, batch)[:, 0])
    torch.testing.assert_close(graft(**batch), expected, rtol=1e-6, atol=1e-6)


def states_and_mask() -> tuple[Tensor, Tensor]:
    states = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    return states, torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])


def test_mean_pooling_is_the_mean_of_the_text() -> None:
    states, mask = states_and_mask()
    expected = torch.stack([states[0, :3].mean(0), states[1, 0]])
    torch.testing.assert_close(pooled(states, mask, "mean"), expected, rtol=1e-6, atol=1e-6)


def test_first_pooling_is_the_first_text_token() -> None:
    states, mask = states_and_mask()
    assert torch.equal(pooled(states, mask, "first"), states[:, 0])


def test_a_row_without_text_gets_the_bias() -> None:
    head, (states, mask) = Head(8, 3), states_and_mask()
    read = pooled(states, torch.zeros_like(mask), "mean")
    assert torch.equal(head([read]), head.linear.bias.expand(2, 3))


def test_long_bf16_texts_are_averaged_in_float32() -> None:
    states = torch.randn(1, 2000, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    read = pooled(states, torch.ones(1, 2000), "mean")
    torch.testing.assert_close(read, states.float().mean(1), rtol=1e-6, atol=1e-6)
