"""Several adapters in one batch: each is as it is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpc_dist.adapter import Adapter, GraftedEncoder
from gpc_dist.adapter.make import new_adapter

from .encoders import P, batch_for, randomise
from .grafts import grafted, options

ROWS = [2, 3, 1]
OUTPUTS = [2, 4, 1]
MIXES = {
    "cells": ["gated", "residual", "recurrent"],
    "methods": ["low-rank", "prompt-tuning", "deep-prompt"],
    "ablations": ["forget", "text-scale", "prompt-scale"],
    "without-cell": ["prompt-tuning", "prompt-tuning", "prompt-tuning"],
}
PACKED_FAMILIES = ["albert", "bert", "deberta-v2", "modernbert", "roberta", "t5", "umt5"]


def packed(family: str, methods: list[str]) -> GraftedEncoder:
    graft = grafted(family, options("prompt-tuning"))
    lanes = [new_adapter(graft, options(m), n) for m, n in zip(methods, OUTPUTS, strict=True)]
    for seed, lane in enumerate(lanes):
        randomise(lane, seed=10 + seed)
    graft.lanes = nn.ModuleList(lanes)
    return graft


def packed_batch(family: str) -> dict[str, Tensor]:
    return batch_for(family, lengths=(9, 4, 7, 9, 2, 6))


def alone(graft: GraftedEncoder, lane: int) -> GraftedEncoder:
    return GraftedEncoder(graft.parts, [graft.lanes[lane]])


def rows_of(batch: dict[str, Tensor], lane: int) -> dict[str, Tensor]:
    first = sum(ROWS[:lane])
    return {name: x[first : first + ROWS[lane]] for name, x in batch.items()}


def lane_gradients(lane: Adapter, outputs: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*lane.named_parameters(), strict=True)
    return dict(
        zip(names, torch.autograd.grad(outputs.square().sum(), parameters, retain_graph=True), strict=True)
    )


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_outputs_and_gradients_of_a_lane_are_those_it_has_alone(family: str, mix: str) -> None:
    graft, batch = packed(family, MIXES[mix]), packed_batch(family)
    outputs = graft(**batch, lane_rows=ROWS)
    assert [tuple(o.shape) for o in outputs] == list(zip(ROWS, OUTPUTS, strict=True))
    for index, lane in enumerate(graft.adapters):
        expected = alone(graft, index)(**rows_of(batch, index))
        torch.testing.assert_close(outputs[index], expected, rtol=1e-5, atol=1e-5)
        found = lane_gradients(lane, outputs[index])
        for name, gradient in lane_gradients(lane, expected).items():
            scale = float(gradient.abs().max())
            assert scale > 0, name
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_one_backward_over_all_lanes_gives_each_its_own_gradients() -> None:
    graft, batch = packed("bert", MIXES["methods"]), packed_batch("bert")
    outputs = graft(**batch, lane_rows=ROWS)
    expected = [lane_gradients(lane, out) for lane, out in zip(graft.adapters, outputs, strict=True)]
    torch.stack([out.square().sum() for out in outputs]).sum().backward()
    for lane, own in zip(graft.adapters, expected, strict=True):
        for name, parameter in lane.named_parameters():
            torch.testing.assert_close(parameter.grad, own[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_a_lane_of_nan_leaves_the_others_bit_for_bit_as_they_were(family: str, checkpointed: bool) -> None:
    graft, batch = packed(family, MIXES["methods"]), packed_batch(family)
    if checkpointed:
        graft.checkpoint_activations()

    def pass_over(lanes: list[int]) -> list[Any]:
        outputs = graft(**batch, lane_rows=ROWS)
        return [(outputs[k], lane_gradients(graft.adapters[k], outputs[k])) for k in lanes]

    before = pass_over([0, 2])
    with torch.no_grad():
        for parameter in graft.lanes[1].parameters():
            parameter.fill_(torch.nan)
    after = pass_over([0, 2])
    for (outputs, own), (outputs_after, own_after) in zip(before, after, strict=True):
        assert torch.equal(outputs, outputs_after)
        assert all(torch.equal(own[name], own_after[name]) for name in own)
    assert graft(**batch, lane_rows=ROWS)[1].isnan().all()


def test_a_lane_may_have_no_rows() -> None:
    graft, batch = packed("bert", MIXES["methods"]), packed_batch("bert")
    outputs = graft(**batch, lane_rows=[6, 0, 0])
    assert [tuple(o.shape) for o in outputs] == [(6, 2), (0, 4), (0, 1)]
    assert torch.equal(outputs[0], alone(graft, 0)(**batch))


@pytest.mark.parametrize("rows", [None, [6], [3, 3], [2, 3, 2], [1, 1, 1], [2, 3, 1, 0], [7, -2, 1], []])
def test_rows_that_do_not_fit_the_lanes_are_refused(rows: list[int] | None) -> None:
    graft = packed("bert", MIXES["methods"])
    with pytest.raises(ValueError, match="lane_rows.*each of 3 lanes and add up to 6"):
        graft(**packed_batch("bert"), lane_rows=rows)


@pytest.mark.parametrize("other", [{"prompt_tokens": P + 1}, {"method": "linear-probe"}])
def test_lanes_with_prompts_of_different_lengths_are_refused(other: dict[str, Any]) -> None:
    graft = packed("bert", MIXES["methods"])
    graft.lanes[2] = new_adapter(graft, options("residual", **other), 1)
    with pytest.raises(ValueError, match=r"equal prompt lengths, not \["):
        graft(**packed_batch("bert"), lane_rows=ROWS)


def test_the_only_adapter_is_asked_of_a_single_lane_alone() -> None:
    graft = packed("bert", MIXES["methods"])
    with pytest.raises(ValueError, match="too many values"):
        _ = graft.adapter
    assert alone(graft, 1).adapter is graft.lanes[1]
