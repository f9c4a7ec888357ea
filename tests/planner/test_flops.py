"""The FLOPs of the dry run are those of the formula, to the last one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from gpc_dist.adapter.graft import GraftedEncoder
from gpc_dist.adapter.halves import LowerHalf, UpperHalf
from gpc_dist.adapter.lane import Adapter
from gpc_dist.config import AdapterConfig
from gpc_dist.encoder.quantize import quantize_layer
from gpc_dist.encoder.shapes import known_config
from gpc_dist.encoder.skeleton import build_skeleton, fill_random
from gpc_dist.planner.dry_run import Footprint, ModelSpec, Way, dry_run, measure_ways
from gpc_dist.planner.flops import flop_counter
from tests.adapter.encoders import FAMILIES, P, tiny_config
from tests.planner.formula import (
    deberta_flops,
    deberta_projections,
    layers_flops,
    linear_weights,
    modernbert_angles,
    trained_flops,
)

LAYERS, ROWS, T, OUTPUTS = 3, 6, 20, 2
S = P + T
PROMPT_TUNING = AdapterConfig(method="prompt-tuning", prompt_tokens=P)


def counted(
    config: Any, adapter: AdapterConfig = PROMPT_TUNING, states_given: bool = True, **run: bool
) -> Footprint:
    model = ModelSpec(config, torch.float32, adapter, OUTPUTS, states_given)
    (found,) = measure_ways(model, T, [Way(**run)])
    return found.at(ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted_exactly(family: str) -> None:
    config = tiny_config(family, num_hidden_layers=LAYERS)
    parts = build_skeleton(config, torch.float32)
    layers = layers_flops(parts, config, S, ROWS)
    head = trained_flops(config.hidden_size * OUTPUTS, 1, ROWS)
    # ALBERT and ELECTRA bring embeddings to the width of the layers
    outside = linear_weights(parts.encoder) - linear_weights(parts.layers)
    embedded = 2.0 * outside * S * ROWS
    forward = layers.forward + head.forward + embedded
    backward = layers.backward + head.backward + embedded
    if family == "deberta-v2":
        added = deberta_flops(config, S, ROWS)
        forward += added.forward + deberta_projections(config)
        backward += added.backward
    if family == "modernbert":
        forward += modernbert_angles(config, S)
    found = counted(config)
    assert (found.forward_flops, found.backward_flops) == (forward, backward)


@pytest.mark.slow
def test_a_well_known_encoder_costs_4n_per_token() -> None:
    """Beside attention, at the size the planner is made for. The cell's share is what it trains at P positions."""
    config = known_config("t5-v1_1-xl")
    layers = layers_flops(build_skeleton(config, torch.bfloat16), config, 612)
    gpc = AdapterConfig(prompt_tokens=100, cell_rank=64)
    cells = trained_flops(4 * 2048 * 64, 23 * 100)
    head = trained_flops(2048 * 2, 1)
    (kept,) = measure_ways(ModelSpec(config, torch.bfloat16, gpc, 2), 512, [Way()])
    found = kept.at(1)
    assert found.forward_flops == layers.forward + cells.forward + head.forward
    assert found.backward_flops == layers.backward + cells.backward + head.backward
    assert found.flops == pytest.approx(layers.forward + layers.backward, rel=0.005)


def test_a_linear_probe_has_no_backward_pass_through_the_encoder() -> None:
    config, probe = tiny_config("bert", num_hidden_layers=LAYERS), AdapterConfig(method="linear-probe")
    found = counted(config, probe, states_given=False)
    assert found.backward_flops == 2 * config.hidden_size * OUTPUTS * ROWS
    layers = layers_flops(build_skeleton(config, torch.float32), config, T, ROWS)
    assert found.forward_flops == layers.forward + found.backward_flops
    cached = counted(config, probe)
    assert cached.forward_flops == cached.backward_flops == found.backward_flops


@pytest.mark.slow
@pytest.mark.parametrize("first_layer", [1, 2])
@pytest.mark.parametrize("family", ["bert", "t5", "umt5", "xlm-roberta-xl"])
def test_a_late_prompt_costs_what_its_layers_cost(family: str, first_layer: int) -> None:
    """4N(1 - k/L) a token with states that are given, and 2N k/L more, for the text alone, without."""
    config = tiny_config(family, num_hidden_layers=LAYERS)
    late = PROMPT_TUNING.model_copy(update={"first_layer": first_layer})
    parts = build_skeleton(config, torch.float32)
    upper, lower = UpperHalf(parts, first_layer).parts, LowerHalf(parts, first_layer).parts
    layers, head = layers_flops(upper, config, S, ROWS), trained_flops(config.hidden_size * OUTPUTS, 1, ROWS)
    given, computed = counted(config, late), counted(config, late, states_given=False)
    assert given.forward_flops == layers.forward + head.forward
    assert given.backward_flops == computed.backward_flops == layers.backward + head.backward
    below = replace(lower, layers=lower.layers[:-1])  # without what stands for layer k
    assert computed.forward_flops - given.forward_flops == layers_flops(below, config, T, ROWS).forward


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "bert"])
def test_recomputation_runs_the_layers_once_more(family: str) -> None:
    """But not a last product whose result nothing in the backward pass needs: T5's, where torch's own linear layer
    saves its frozen weights before it runs."""
    config = tiny_config(family, num_hidden_layers=LAYERS)
    parts = build_skeleton(config, torch.float32)
    layers = layers_flops(parts, config, S, ROWS)
    last = 2.0 * LAYERS * config.hidden_size * 48 * S * ROWS if family == "t5" else 0.0
    plain = counted(config)
    again = counted(config, recompute=True)
    sharded = counted(config, recompute=True, sharded=True)
    assert again.forward_flops == sharded.forward_flops == plain.forward_flops
    assert again.backward_flops - plain.backward_flops == layers.forward - last
    assert sharded.backward_flops - plain.backward_flops == layers.forward


def test_a_quantised_encoder_costs_the_same() -> None:
    config = tiny_config("t5", num_hidden_layers=LAYERS)
    parts = build_skeleton(config, torch.float32)
    fill_random(parts, torch.device("cpu"))
    for layer in parts.layers:
        quantize_layer(layer, "int8")
    found = dry_run(GraftedEncoder(parts, [Adapter(PROMPT_TUNING, parts.shape, OUTPUTS)]), ROWS, T)
    plain = counted(config)
    assert (found.forward_flops, found.backward_flops) == (plain.forward_flops, plain.backward_flops)


def test_torchs_own_counter_misses_attention_on_a_cpu_alone() -> None:
    query = torch.zeros(2, 4, 16, 8, requires_grad=True)
    totals = []
    for counter in (flop_counter(), FlopCounterMode(display=False)):
        with counter, FakeTensorMode(allow_non_fake_inputs=True):
            states = torch.nn.functional.scaled_dot_product_attention(query, query, query)
            (states @ torch.zeros(8, 5)).sum().backward()
        totals.append(counter.get_total_flops())
    product = 2 * 2 * 4 * 16 * 8 * 5
    assert totals[0] == 2 * product + 6 * (2 * 2 * 4 * 16 * 16 * 8)
    assert totals[1] == 2 * product
