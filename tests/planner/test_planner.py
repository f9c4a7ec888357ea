"""The planner's sums, and what it recommends."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from gpc_dist.adapter.families import locate
from gpc_dist.config import AdapterConfig
from gpc_dist.encoder.frozen import count_parameters
from gpc_dist.encoder.shapes import known_config
from gpc_dist.encoder.skeleton import build_skeleton
from gpc_dist.errors import UserError
from gpc_dist.planner.devices import GIB, find_device
from gpc_dist.planner.dry_run import Activations, Footprint, ModelSpec, Passes
from gpc_dist.planner.planner import Estimate, Planner, recommend, scaling, why
from gpc_dist.planner.regime import REGIMES, Regime, regimes_for
from gpc_dist.planner.timing import Cluster
from gpc_dist.planner.workload import Workload, count_weights, describe
from gpc_dist.shipped import shipped_folder
from tests.adapter.encoders import FAMILIES, tiny, tiny_config
from tests.planner.formula import layers_flops

ZERO3 = json.loads((shipped_folder("ds_configs") / "zero3.json").read_text())["zero_optimization"]


def workload(shape: str, dtype: torch.dtype, rows: int = 32) -> Workload:
    """A known shape with activations of 2 MB a row and layer, 0.1 MB of them when layers are run again."""
    config = known_config(shape)
    parts, layers = build_skeleton(config, dtype), config.num_hidden_layers
    row = layers_flops(parts, config, 276)

    def passes(saved: float, peak: float, recomputed: float = 0.0) -> Activations:
        few, many = (
            Footprint(
                layers * saved * n,
                layers * peak * n,
                700.0 * layers,
                row.forward * n,
                (row.backward + recomputed) * n,
            )
            for n in (4, 32)
        )
        return Activations(few, many)

    return Workload(
        weights=count_weights(parts),
        adapter_tensors=(200_000, 100_000, 2),
        moments=2,
        passes=Passes(
            kept=passes(2e6, 2.1e6),
            recomputed=passes(1e5, 2e5, row.forward),
            kept_sharded=passes(3e6, 3.1e6),
            recomputed_sharded=passes(1e5, 3e5, row.forward),
        ),
        tokens=256,
        prompt_tokens=20,
        rows=rows,
    )


@pytest.fixture(scope="module")
def xxl() -> Workload:
    return workload("t5-v1_1-xxl", torch.float32)


@pytest.fixture(scope="module")
def large() -> Workload:
    return workload("t5-v1_1-large", torch.bfloat16)


def cluster(gpu: str = "h100", nodes: int = 1, per_node: int = 8, memory_gib: float | None = None) -> Cluster:
    return Cluster(find_device(gpu, memory_gib), nodes, per_node)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_counted_exactly(family: str) -> None:
    model = tiny(family)
    parts = locate(model)
    found = count_weights(build_skeleton(tiny_config(family), torch.float32))
    pooler = sum(p.numel() for name, p in model.named_parameters() if name.startswith("pooler."))
    assert found.total == count_parameters(parts) - pooler
    assert found.table == parts.token_embeddings.weight.numel()
    assert found.element_bytes == 4


@pytest.mark.parametrize(("name", "size"), [("xlm-roberta-xl", 3.5e9), ("facebook/xlm-roberta-xxl", 10.7e9)])
def test_whole_models_have_their_published_sizes(name: str, size: float) -> None:
    assert count_weights(build_skeleton(known_config(name), torch.bfloat16)).total == pytest.approx(
        size, rel=0.01
    )


def test_ul2_has_its_published_size() -> None:
    """20 B parameters: a layer of its decoder has another attention, and the vocabulary stands there once more."""
    weights = count_weights(build_skeleton(known_config("google/ul2"), torch.bfloat16))
    attention = 4 * 4096 * 16 * 256
    assert 2 * weights.total + weights.layers * attention == pytest.approx(20e9, rel=0.03)


def test_a_known_encoder_has_its_published_size() -> None:
    config = known_config("t5-v1_1-xl")
    weights = count_weights(build_skeleton(config, torch.bfloat16))
    assert weights.total == pytest.approx(1.22e9, rel=0.01)
    assert weights.layers == 24
    assert weights.matrices + weights.table < weights.total < weights.matrices + weights.table + 200_000


def test_frozen_weights_by_regime(large: Workload) -> None:
    planner, eight = Planner(large, ZERO3), cluster()
    weights = large.weights

    def frozen(regime: Regime) -> float:
        return planner.memory(regime, eight, 1).frozen

    assert frozen(Regime(0)) == frozen(Regime(1)) == frozen(Regime(2)) == 2 * weights.total
    sharded = 2 * (weights.table + weights.body / 8)
    assert frozen(Regime(3)) == pytest.approx(sharded, rel=0.01)
    assert frozen(Regime(3, "cpu")) == pytest.approx(2 * weights.table, rel=0.01)
    assert frozen(Regime(quantize="int8")) == pytest.approx(2 * weights.table + weights.matrices, rel=0.01)
    # a scale of two bytes for each 256 values, and a second shard of the ranks of a node
    small = weights.body - weights.matrices
    int8 = weights.matrices * (1 + 2 / 256)
    assert frozen(Regime(3, quantize="int8")) == pytest.approx(
        2 * weights.table + (2 * small + int8) / 8, rel=0.01
    )
    assert frozen(Regime(3, "cpu", "int8")) == frozen(Regime(3, "cpu"))
    twice = planner.memory(Regime(3, hpz=True), replace(eight, nodes=4), 1).frozen
    assert twice == pytest.approx(2 * (weights.table + weights.body * (1 / 32 + 1 / 8)), rel=0.01)
    without_table = Planner(large, ZERO3, table_on_device=False)
    assert frozen(Regime(3)) - without_table.memory(Regime(3), eight, 1).frozen == 2 * weights.table


def test_the_trained_state_by_stage(large: Workload) -> None:
    planner, eight = Planner(large, ZERO3), cluster()
    assert planner.memory(Regime(0), eight, 1).trained == 16 * large.adapter
    # the largest tensor's owner keeps its moments whole
    assert planner.memory(Regime(1), eight, 1).trained == 8 * large.adapter + 8 * 200_000
    adafactor = Planner(replace(large, moments=0), ZERO3)
    assert adafactor.memory(Regime(0), eight, 1).trained == 8 * large.adapter


def test_gathered_layers(xxl: Workload) -> None:
    layer, eight = xxl.weights.layer, cluster()
    lean = Planner(xxl, ZERO3 | {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0})
    # one runs, one is on its way in the collective's buffer and as tensors
    assert lean.memory(Regime(3), eight, 1).gathered == 4 * 3 * layer
    kept = Planner(xxl, ZERO3 | {"stage3_max_reuse_distance": 5 * layer})
    assert kept.memory(Regime(3), eight, 1).gathered == 4 * (3 + 3) * layer
    whole = Planner(xxl, ZERO3 | {"stage3_max_reuse_distance": 100 * layer})
    assert whole.memory(Regime(3), eight, 10_000).gathered == pytest.approx(4 * xxl.weights.body)
    alone = cluster(per_node=1)
    assert kept.memory(Regime(3), alone, 1).gathered == 0
    assert kept.memory(Regime(3, "cpu"), alone, 1).gathered > 0
    assert kept.memory(Regime(0), eight, 1).gathered == 0


def test_the_largest_micro_batch_is_the_largest(large: Workload) -> None:
    planner, small = Planner(large, ZERO3), cluster(memory_gib=8)
    for regime in REGIMES:
        most = planner.estimate(regime, small).most_rows
        usable = 0.9 * 8 * GIB
        assert planner.memory(regime, small, most).total <= usable
        assert planner.memory(regime, small, most + 1).total > usable


def test_a_step_that_does_not_fit_at_once_is_run_in_passes(large: Workload) -> None:
    planner = Planner(replace(large, rows=1000), ZERO3)
    found = planner.estimate(Regime(), cluster(per_node=1, memory_gib=8))
    assert 0 < found.most_rows < 1000
    passes = -(-1000 // found.most_rows)
    assert passes > 1
    assert found.micro_rows == -(-1000 // passes)
    assert found.memory.total <= 0.9 * 8 * GIB
    # what each pass holds decides its memory, and all of them together the time
    assert found.memory == planner.memory(Regime(), cluster(per_node=1, memory_gib=8), found.micro_rows)
    whole = planner.estimate(Regime(), cluster(per_node=1, memory_gib=80))
    assert whole.micro_rows == 1000
    assert found.step_s >= whole.step_s


def test_what_does_not_fit(xxl: Workload) -> None:
    """19 GB of float32 weights with 40 GiB fit; with 16 GiB only sharded or offloaded ones do."""
    planner = Planner(xxl, ZERO3)
    assert planner.estimate(Regime(0, recompute=True), cluster("a100-40")).fits
    tight = cluster("a100-40", per_node=8, memory_gib=16)
    found = {regime: planner.estimate(regime, tight) for regime in REGIMES}
    assert not found[Regime(0, recompute=True)].fits
    assert not found[Regime(2, recompute=True)].fits
    assert found[Regime(3, recompute=True)].fits
    chosen = recommend(list(found.values()))
    assert chosen is not None
    assert chosen.regime.zero_stage == 3
    assert recommend([e for e in found.values() if not e.fits]) is None


def test_the_simplest_of_the_fastest_is_recommended(large: Workload) -> None:
    planner, roomy = Planner(large, ZERO3), cluster()
    chosen = recommend([planner.estimate(regime, roomy) for regime in REGIMES])
    assert chosen is not None
    assert chosen.regime == Regime()


def test_offload_comes_last_and_every_choice_has_its_reason(large: Workload) -> None:
    planner, eight = Planner(large, ZERO3), cluster()

    def taking(regime: Regime, step_s: float) -> Estimate:
        return replace(planner.estimate(regime, eight), step_s=step_s, most_rows=8)

    def without(*left_out: Estimate) -> tuple[Regime, str]:
        """The regime that is taken when these do not fit, and why."""
        found = [replace(e, most_rows=0) if e in left_out else e for e in every]
        chosen = recommend(found)
        assert chosen is not None
        return chosen.regime, why(chosen, found)

    whole, whole_again = taking(Regime(), 1.0), taking(Regime(recompute=True), 3.0)
    sharded, sharded_again = taking(Regime(3), 2.0), taking(Regime(3, recompute=True), 1.9)
    offloaded = taking(Regime(3, "cpu"), 0.1)
    every = [whole, whole_again, sharded, sharded_again, offloaded]
    assert without() == (whole.regime, "fits whole, so nothing is gathered")
    assert without(whole, sharded_again) == (sharded.regime, "1.50 times as fast as whole")
    assert without(whole, sharded, sharded_again) == (
        whole_again.regime,
        "fits whole, so nothing is gathered; without recomputation too large",
    )
    assert without(whole, whole_again, sharded_again) == (sharded.regime, "does not fit whole")
    assert without(whole, whole_again) == (
        sharded_again.regime,
        "does not fit whole; without recomputation in more passes",
    )
    assert without(whole, whole_again, sharded, sharded_again) == (offloaded.regime, "fits with offload only")


def test_one_gpu_takes_what_it_can(xxl: Workload) -> None:
    planner = Planner(xxl, ZERO3)
    alone = cluster(per_node=1, memory_gib=16)
    plain = [regime for regime in REGIMES if regime.quantize == "none" and regime.offload != "nvme"]
    chosen = recommend([planner.estimate(regime, alone) for regime in plain])
    assert chosen is not None
    assert chosen.regime.offload == "cpu"
    resident = xxl.weights.persistent(ZERO3["stage3_param_persistence_threshold"])
    assert chosen.host_bytes == pytest.approx(4 * (xxl.weights.body - resident))


def test_time_follows_the_model(large: Workload) -> None:
    planner = Planner(replace(large, rows=4096), ZERO3)
    eight = cluster()
    plain, recomputed = (planner.estimate(Regime(recompute=r), eight) for r in (False, True))
    assert 0 < plain.mfu <= 0.55
    assert recomputed.step_s > 1.2 * plain.step_s
    assert planner.estimate(Regime(3, "nvme"), eight).step_s > planner.estimate(Regime(3), eight).step_s
    assert planner.estimate(Regime(quantize="int8"), eight).step_s > plain.step_s
    assert planner.estimate(Regime(3), eight).sent_bytes > 100 * plain.sent_bytes
    sharded, int8 = (planner.estimate(Regime(3, quantize=q), eight).sent_bytes for q in ("none", "int8"))
    assert int8 - plain.sent_bytes == pytest.approx((sharded - plain.sent_bytes) / 2, rel=0.01)
    alone = planner.estimate(Regime(3), cluster(per_node=1))
    assert alone.communication_share == 0
    assert alone.sent_bytes == 0


def test_more_nodes_add_communication_and_nothing_else(large: Workload) -> None:
    planner = Planner(replace(large, rows=256), ZERO3)
    found = scaling(planner, Regime(3), cluster(), [1, 2, 8, 64])
    assert [round(e.rows_per_s * e.step_s) for e in found] == [256, 512, 2048, 16384]
    shares = [e.communication_share for e in found]
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] < 1
    assert [e.mfu for e in found] == sorted((e.mfu for e in found), reverse=True)


def test_second_shards_keep_gathering_inside_a_node(large: Workload) -> None:
    planner, one = Planner(large, ZERO3), cluster()
    four = replace(one, nodes=4)
    inside = planner.estimate(Regime(3), one)
    across, twice = (planner.estimate(Regime(3, hpz=hpz), four) for hpz in (False, True))
    assert twice.step_s < across.step_s
    assert twice.sent_bytes == pytest.approx(inside.sent_bytes, rel=0.01)
    assert {regime.hpz for regime in regimes_for(4, 8)} == {True, False}
    for nodes, per_node in ((1, 8), (4, 1)):
        assert not any(regime.hpz for regime in regimes_for(nodes, per_node))


@pytest.mark.slow
def test_a_workload_is_described_from_configurations_alone() -> None:
    model = ModelSpec(tiny_config("bert"), torch.float32, AdapterConfig(prompt_tokens=20), outputs=2)
    found = describe(model, optimizer="adamw", max_length=256, rows=8)
    # 64 positions leave 44 beside the prompt
    assert (found.tokens, found.prompt_tokens, found.row_tokens) == (44, 20, 64)
    prompt, cell, head = 20 * 32, 2 * 32 * 32 + 32, 2 * 32 + 2
    assert found.adapter == sum(found.adapter_tensors) == prompt + cell + head
    assert found.passes.recomputed.at(8).saved < found.passes.kept.at(8).saved


@pytest.mark.slow
@pytest.mark.parametrize(("first_layer", "layers"), [(0.5, 2), (3, 1)])
def test_a_late_workload_has_two_halves(first_layer: float, layers: int) -> None:
    config = tiny_config("bert", num_hidden_layers=4)
    late = AdapterConfig(prompt_tokens=20, first_layer=first_layer, method="prompt-tuning")
    model = ModelSpec(config, torch.float32, late, outputs=2)
    found = describe(model, optimizer="adamw", max_length=256, rows=8)
    whole = count_weights(build_skeleton(config, torch.float32))
    assert found.lower is not None
    assert (found.weights.layers, found.lower.table, found.weights.table) == (layers, whole.table, 0)
    assert found.weights.matrices + found.lower.matrices == whole.matrices
    assert found.states_row_bytes == 44 * 32 * 4
    memory = Planner(found, ZERO3).memory(Regime(0), cluster(), 8)
    assert memory.frozen >= whole.total * 4  # both halves, while text states are computed
    computed = describe(replace(model, states_given=False), optimizer="adamw", max_length=256, rows=8)
    assert (computed.lower, computed.states_row_bytes, computed.weights) == (None, 0, whole)


@pytest.mark.parametrize(("layers", "count"), [("last", 1), ("mix", 3)])
def test_a_linear_probe_keeps_pooled_states_for_each_row(layers: str, count: int) -> None:
    probe = AdapterConfig(method="linear-probe", head_layers=layers, first_layer=2)
    model = ModelSpec(tiny_config("bert", num_hidden_layers=4), torch.bfloat16, probe, outputs=2)
    found = describe(model, optimizer="adamw", max_length=48, rows=8)
    assert (found.states_row_bytes, found.weights.total) == (count * 32 * 4, 0)
    for regime in (Regime(0), Regime(3), Regime(0, "none", "int8")):
        assert Planner(found, ZERO3).estimate(regime, cluster()).fits


def test_a_prompt_must_leave_room_for_text() -> None:
    model = ModelSpec(tiny_config("bert"), torch.float32, AdapterConfig(prompt_tokens=64), outputs=2)
    with pytest.raises(UserError, match=r"prompt_tokens 64 leaves none of the encoder's 64 positions"):
        describe(model, optimizer="adamw", max_length=256, rows=8)
