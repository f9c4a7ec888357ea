"""Compiled layers: the same outputs and gradients, for batches of any length, compiled once."""

from __future__ import annotations

import copy

import pytest
import torch

from gpc_dist.adapter import GraftedEncoder

from .encoders import batch_for
from .grafts import grafted, options


@pytest.mark.slow
@pytest.mark.parametrize(("family", "recompute"), [("bert", False), ("t5", True)])
def test_compiled_layers_give_the_same_for_every_length(family: str, recompute: bool) -> None:
    torch._dynamo.reset()
    plain = grafted(family, options("gated"))
    compiled = GraftedEncoder(copy.deepcopy(plain.parts), [copy.deepcopy(plain.adapter)])
    # what autograd sees is the same for every backend; this one needs no compiler
    compiled.compile_layers(backend="aot_eager")
    if recompute:
        compiled.checkpoint_activations()
    graphs = []
    for lengths in ((9, 4), (12, 7, 3), (11, 2), (8, 5, 4)):
        batch = batch_for(family, lengths=lengths)
        for graft in (plain, compiled):
            graft.zero_grad()
            graft(**batch).square().sum().backward()
        for (name, a), b in zip(plain.adapter.named_parameters(), compiled.adapter.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=name)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[1], "a new length must not be compiled again"
