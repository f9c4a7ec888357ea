"""The dry run counts what a real pass takes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from gpc_dist.adapter.families import locate
from gpc_dist.adapter.graft import GraftedEncoder
from gpc_dist.adapter.lane import Adapter
from gpc_dist.config import AdapterConfig
from gpc_dist.encoder.skeleton import build_skeleton, freeze
from gpc_dist.planner.dry_run import (
    Footprint,
    LiveStorages,
    ModelSpec,
    Way,
    dry_run,
    give_fake_values,
    inputs_saved,
    layer_period,
    measure_passes,
    measure_ways,
)
from gpc_dist.private.torch import FakeTensorMode
from tests.adapter.encoders import FAMILIES, tiny, tiny_config

pytestmark = pytest.mark.slow

ADAPTER = AdapterConfig(prompt_tokens=3)
LAYERS = 5


def grafted(parts: Any, recompute: bool = False, adapter: AdapterConfig = ADAPTER) -> GraftedEncoder:
    model = GraftedEncoder(parts, [Adapter(adapter, parts.shape, 2)]).train()
    if recompute:
        model.checkpoint_activations()
    return model


def on_paper(family: str, rows: int, recompute: bool, adapter: AdapterConfig = ADAPTER) -> Footprint:
    parts = build_skeleton(tiny_config(family, num_hidden_layers=LAYERS), torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        give_fake_values(parts)
        return dry_run(grafted(parts, recompute, adapter), rows, 24)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dry_run_takes_what_a_real_one_does(family: str, recompute: bool) -> None:
    real = dry_run(grafted(locate(freeze(tiny(family, num_hidden_layers=LAYERS))), recompute), 5, 24)
    dry = on_paper(family, 5, recompute)
    assert dry.saved == pytest.approx(real.saved, rel=0.01)
    assert dry.peak == pytest.approx(real.peak, rel=0.01)
    assert dry.operators == pytest.approx(real.operators, rel=0.01)
    assert (dry.forward_flops, dry.backward_flops) == (real.forward_flops, real.backward_flops)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["t5", "bert"])
def test_saved_bytes_are_those_autograd_packs(family: str, recompute: bool) -> None:
    """Counted in another way: the storages that autograd itself says it keeps."""
    model = grafted(locate(freeze(tiny(family, num_hidden_layers=LAYERS))), recompute)
    ids = torch.ones(8, 24, dtype=torch.long)
    mask = ids.clone()
    mask[0, -1] = 0
    standing = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    packed: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in standing:
            packed[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(ids, mask)
        F.cross_entropy(outputs, torch.zeros(8, dtype=torch.long), reduction="sum")
    saved = on_paper(family, 8, recompute).saved
    assert saved == pytest.approx(sum(packed.values()), rel=0.1)


@pytest.mark.parametrize("family", ["t5", "roberta", "modernbert", "albert"])
def test_rows_and_layers_add_up(family: str) -> None:
    config = tiny_config(family, num_hidden_layers=LAYERS)
    model, ways = ModelSpec(config, torch.float32, ADAPTER, outputs=2), [Way(), Way(recompute=True)]
    for (_, recompute), found in zip(ways, measure_ways(model, 24, ways), strict=True):
        for rows in (8, 50):
            exact = on_paper(family, rows, recompute)
            assert found.at(rows).saved == pytest.approx(exact.saved, rel=0.001)
            assert found.at(rows).peak == pytest.approx(exact.peak, rel=0.02)
            assert found.at(rows).operators == exact.operators
            assert found.at(rows).flops == pytest.approx(exact.flops)


@pytest.mark.parametrize("layers", [[0], [2, 3]])
def test_a_cell_after_some_layers_is_counted_there(layers: list[int]) -> None:
    """Also after one that the shallow dry runs of other adapters do not have."""
    adapter = ADAPTER.model_copy(update={"cell_layers": layers, "cell_per_layer": True})
    config = tiny_config("bert", num_hidden_layers=LAYERS)
    (kept,) = measure_ways(ModelSpec(config, torch.float32, adapter, outputs=2), 24, [Way()])
    exact = on_paper("bert", 8, False, adapter)
    assert kept.at(8).saved == pytest.approx(exact.saved, rel=0.001)
    assert kept.at(8).operators == exact.operators
    assert kept.at(8).flops == pytest.approx(exact.flops)
    assert exact.operators < on_paper("bert", 8, False).operators


def test_recomputation_and_bf16_save_memory() -> None:
    config = tiny_config("t5", num_hidden_layers=LAYERS)
    full = measure_passes(ModelSpec(config, torch.float32, ADAPTER, outputs=2), tokens=24)
    (half,) = measure_ways(ModelSpec(config, torch.bfloat16, ADAPTER, outputs=2), 24, [Way()])
    assert full.recomputed.at(16).saved < 0.3 * full.kept.at(16).saved
    assert half.at(16).saved < 0.75 * full.kept.at(16).saved  # norms work in float32
    assert full.recomputed.at(16).saved < full.recomputed.at(16).peak
    assert full.kept_sharded.at(16).saved > full.kept.at(16).saved
    assert full.recomputed_sharded.at(16).saved == full.recomputed.at(16).saved


def test_saved_inputs_change_no_gradient() -> None:
    """What stands in for DeepSpeed's linear layers in a dry run computes the same."""
    model = grafted(locate(tiny("bert")))
    ids = torch.ones(2, 8, dtype=torch.long)
    gradients = []
    for context in (nullcontext(), inputs_saved()):
        with context:
            model(ids).square().sum().backward()
        gradients.append([p.grad for p in model.adapter.parameters()])
        assert all(g.abs().max() > 1e-3 for g in gradients[-1])
        for parameter in model.adapter.parameters():
            parameter.grad = None
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_layers_of_several_kinds_repeat() -> None:
    assert layer_period([None] * 4) == 1
    alternating = tiny_config("modernbert", num_hidden_layers=LAYERS, global_attn_every_n_layers=3)
    assert layer_period(alternating.layer_types) == 3


@pytest.mark.parametrize("family", ["modernbert", "t5"])
def test_upper_layers_add_up(family: str) -> None:
    """As for a whole encoder: extrapolated from shallow dry runs, or run at its own depth."""
    config = tiny_config(family, num_hidden_layers=8)
    late = ADAPTER.model_copy(update={"first_layer": 2})
    in_full = late.model_copy(update={"cell_layers": [2, 3, 4, 5, 6]})
    (found,), (exact,) = (
        measure_ways(ModelSpec(config, torch.float32, each, outputs=2), 24, [Way()])
        for each in (late, in_full)
    )
    for rows in (8, 50):
        assert found.at(rows).saved == pytest.approx(exact.at(rows).saved, rel=0.001)
        assert found.at(rows).peak == pytest.approx(exact.at(rows).peak, rel=0.02)
        assert found.at(rows).flops == pytest.approx(exact.at(rows).flops)
    whole = measure_ways(ModelSpec(config, torch.float32, ADAPTER, outputs=2), 24, [Way()])[0].at(8)
    assert found.at(8).saved < 0.8 * whole.saved


def test_live_storages_come_and_go() -> None:
    standing = torch.zeros(1000)
    with LiveStorages([standing]) as live:
        view = standing[:10]
        first = torch.zeros(100)
        second = first + 1
        assert live.bytes == 800
        del first
        assert (live.bytes, live.peak) == (400, 800)
        third = second.view(10, 10)
        assert live.bytes == 400
    del view, third
