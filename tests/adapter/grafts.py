"""Grafts onto tiny encoders, and what tests look at in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpc_dist.adapter import Adapter, AdapterConfig, GraftedEncoder, attach
from gpc_dist.adapter.store import load_adapter

from .encoders import P, randomise, tiny

METHODS: dict[str, dict[str, Any]] = {
    "recurrent": {"cell": "recurrent"},
    "gated": {"cell": "gated"},
    "residual": {"cell": "residual"},
    "low-rank": {"cell": "residual", "cell_rank": 3},
    "recurrent-low-rank": {"cell": "recurrent", "cell_rank": 3},
    "per-layer": {"cell": "gated", "cell_per_layer": True},
    "remember": {"cell": "recurrent", "cell_units": "remember", "cell_norm": True},
    "forget": {"cell": "residual", "cell_units": "forget", "cell_layers": [1], "cell_per_layer": True},
    "prompt-scale": {"cell": "residual", "cell_scale": "prompt", "cell_norm": True, "cell_rank": 3},
    "text-scale": {"cell": "gated", "cell_scale": "text", "cell_layers": [0]},
    "read-by-the-head": {
        "cell": "recurrent",
        "pooling": "prompt",
        "cell_per_layer": True,
        "cell_scale": "prompt",
    },
    "deep-prompt": {"method": "deep-prompt"},
    "deep-prompt-mlp": {"method": "deep-prompt", "prompt_mlp": 5},
    "prompt-tuning": {"method": "prompt-tuning"},
    "prompt-tuning-mlp": {"method": "prompt-tuning", "prompt_mlp": 5},
}
"""Every method that has a prompt, and every cell in its variants."""
_BARE = {"cell_norm": False, "cell_scale": "none"}
"""Cells that read and write states as they are, unless a variant says otherwise."""


def options(name: str, **more: Any) -> AdapterConfig:
    return AdapterConfig(**({"prompt_tokens": P} | _BARE | METHODS[name] | more))


def grafted(encoder: str | Any, config: AdapterConfig, outputs: int = 3, draw: bool = True) -> GraftedEncoder:
    """A graft onto an encoder or a tiny one of a family. `draw` gives all trained tensors random values: at
    its zero start a cell would leave half of its weights unused."""
    graft = attach(tiny(encoder) if isinstance(encoder, str) else encoder, config, outputs=outputs)
    if draw:
        randomise(graft.adapter, seed=1)
    return graft


def read_states(graft: GraftedEncoder, batch: dict[str, Tensor]) -> Tensor:
    """States of the positions that the head reads, after the last layer: the text's with its padding `[B, T, H]`,
    or the prompt's `[B, P, H]`."""
    adapter = graft.adapter

    def positions(states: Tensor, *_: Any) -> Tensor:
        prompt, text = states[:, : adapter.prompt_tokens], states[:, adapter.prompt_tokens :]
        return prompt if adapter.config.pooling == "prompt" else text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "read_out", positions)
        return graft(**batch)


def read_of(states: Tensor, config: AdapterConfig) -> Tensor:
    """Of all states `[B, P+T, H]`, those that `read_states` gives."""
    return states[:, :P] if config.pooling == "prompt" else states[:, P:]


def trained(graft: GraftedEncoder) -> dict[str, nn.Parameter]:
    return dict(graft.adapter.named_parameters())


def assert_lanes_as_alone(
    graft: GraftedEncoder, batch: dict[str, Tensor], lanes: list[Adapter], counts: list[int]
) -> None:
    """Each lane, with random values, gives its rows of the batch what it gives them alone."""
    for seed, lane in enumerate(lanes):
        randomise(lane, seed=10 + seed)
    together = graft(**batch, lane_rows=counts, lanes=lanes)
    first = 0
    for lane, count, outputs in zip(lanes, counts, together, strict=True):
        rows = slice(first, first := first + count)
        single = graft(**{name: x[rows] for name, x in batch.items()}, lanes=[lane])
        torch.testing.assert_close(outputs, single, rtol=1e-5, atol=1e-6)


def assert_loads(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = dict(load_adapter(folder)[0].named_parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def gradients(graft: GraftedEncoder, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed loss in which all outputs take part."""
    graft.zero_grad()
    outputs = graft(**batch)
    torch.sum(outputs * torch.linspace(-1, 1, outputs.numel()).view_as(outputs)).backward()
    return {n: p.grad.clone() for n, p in trained(graft).items() if p.grad is not None}
