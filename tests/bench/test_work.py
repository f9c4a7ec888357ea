"""The work of rows of several lengths, from dry runs of three of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpc_dist.bench.work import count_work
from gpc_dist.config import AdapterConfig
from gpc_dist.encoder.skeleton import build_skeleton
from gpc_dist.planner.dry_run import ModelSpec
from tests.adapter.encoders import H, P, tiny_config
from tests.planner.formula import Flops, deberta_flops, layers_flops, trained_flops

GPC = AdapterConfig(prompt_tokens=P)


def total(*parts: Flops) -> float:
    return sum(each.forward + each.backward for each in parts)


TRAINED = total(trained_flops(2 * H * H, 2 * P), trained_flops(2 * H, 1))
"""Of a row: a cell after two of three layers, and the head."""


@pytest.mark.parametrize(
    "lengths",
    [
        [30],
        # five lengths, of which three are run, and one of them twice
        pytest.param([40, 7, 8, 21, 39, 8], marks=pytest.mark.slow),
    ],
)
def test_rows_of_any_length_are_counted_exactly(lengths: list[int]) -> None:
    config = tiny_config("roberta")
    parts = build_skeleton(config, torch.float32)
    rows = [layers_flops(parts, config, P + n) for n in lengths]
    needed = total(*rows) + len(lengths) * TRAINED
    model = ModelSpec(config, torch.float32, GPC, outputs=2)
    work = count_work(model, np.array(lengths), sharded=False, recompute=False)
    assert work.model == work.hardware == pytest.approx(needed, rel=1e-9)
    again = count_work(model, np.array(lengths), sharded=True, recompute=True)
    assert again.model == pytest.approx(needed, rel=1e-9)
    assert again.hardware - needed == pytest.approx(sum(each.forward for each in rows), rel=1e-9)


@pytest.mark.slow
def test_what_a_pass_computes_once_for_all_rows_is_left_out() -> None:
    """DeBERTa's frozen relative positions, which the method could keep."""
    config = tiny_config("deberta-v2")
    layers = layers_flops(build_skeleton(config, torch.float32), config, P + 24)
    needed = total(layers, deberta_flops(config, P + 24)) + TRAINED
    model = ModelSpec(config, torch.float32, GPC, outputs=2)
    for rows in (1, 3):
        work = count_work(model, np.full(rows, 24), sharded=False, recompute=False)
        assert work.model == pytest.approx(rows * needed, rel=1e-9)
