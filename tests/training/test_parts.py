"""Schedules, losses and the optimizer against plain re-computations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from gpc_dist.adapter.lane import Adapter, EncoderShape
from gpc_dist.config import AdapterConfig, DataConfig, TaskConfig, TrainConfig
from gpc_dist.engine.distributed import World
from gpc_dist.engine.optimizer import LaneOptimizer, _owners, reduce_gradients
from gpc_dist.tasks import Batch, Example, make_task
from gpc_dist.training.objective import split_outputs, summed_loss
from gpc_dist.training.schedule import factor

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warm_up_rises_in_a_line(schedule: str) -> None:
    assert [factor(schedule, step, 4, 20) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]  # type: ignore[arg-type]


def test_schedules_after_warm_up() -> None:
    assert factor("constant", 19, 4, 20) == 1
    assert factor("linear", 12, 4, 20) == pytest.approx(0.5)
    assert factor("cosine", 12, 4, 20) == pytest.approx(0.5)
    assert factor("cosine", 8, 4, 20) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert factor("linear", 20, 4, 20) == 0
    assert factor("linear", 0, 0, 20) == 1


def batch(rows: list[int], targets: torch.Tensor) -> Batch:
    ids = torch.ones(sum(rows), 3, dtype=torch.int64)
    return Batch(ids, ids, None, rows, targets, np.arange(len(rows)), ids.numel())


def test_classification_loss_is_summed_cross_entropy() -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([1, 0, 3])
    loss = summed_loss("classification", logits, batch([1, 1, 1], targets))
    expected = -sum(
        math.log(math.exp(row[t]) / sum(math.exp(x) for x in row))
        for row, t in zip(logits.double().tolist(), targets, strict=True)
    )
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_choice_loss_is_the_likelihood_of_all_right_candidates() -> None:
    scores = torch.tensor([[0.3], [1.2], [-0.4], [2.0], [0.1]])
    right = torch.tensor([False, True, True, False, True])
    loss = summed_loss("choice", scores, batch([3, 2], right))
    e = [math.exp(x) for x in scores.squeeze(1).tolist()]
    expected = -math.log((e[1] + e[2]) / sum(e[:3])) - math.log(e[4] / (e[3] + e[4]))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert [o.tolist() for o in split_outputs(scores, batch([3, 2], right))] == [
        pytest.approx([0.3, 1.2, -0.4]),
        pytest.approx([2.0, 0.1]),
    ]


def test_regression_loss_is_summed_squared_error() -> None:
    loss = summed_loss("regression", torch.tensor([[1.0], [4.0]]), batch([1, 1], torch.tensor([3.0, 3.5])))
    assert loss.item() == pytest.approx(4.25)


@pytest.mark.parametrize(
    ("config", "targets", "rows"),
    [
        (TaskConfig(name="cb"), [0, 2, 1], [1, 1, 1]),
        (TaskConfig(name="record"), [(1, 2), (0,), (3,)], [3, 2, 4]),
        (TaskConfig(name="mine", kind="regression", text=["a"], label="b"), [0.5, -3.0, 2.0], [1, 1, 1]),
    ],
)
def test_the_loss_of_an_evaluation_is_the_mean_of_what_training_lowers(
    config: TaskConfig, targets: list[Any], rows: list[int]
) -> None:
    task = make_task(config, DataConfig())
    examples = [
        Example(i, (("", None),) * n, target) for i, (n, target) in enumerate(zip(rows, targets, strict=True))
    ]
    outputs = 50 * torch.randn(sum(rows), task.outputs, generator=torch.Generator().manual_seed(0))
    flat = [
        float(c in t) if isinstance(t, tuple) else t
        for n, t in zip(rows, targets, strict=True)
        for c in range(n)
    ]
    one = batch(rows, torch.tensor(flat))
    expected = summed_loss(task.kind, outputs, one).item() / len(rows)
    assert expected > 1
    assert task.loss(examples, split_outputs(outputs, one)) == pytest.approx(expected, rel=1e-6)


def adapter(seed: int = 0) -> Adapter:
    return Adapter(AdapterConfig(prompt_tokens=3, cell="recurrent"), EncoderShape(3, 8, 8), 2, seed)


def test_clipping_and_adamw_are_plain_pytorchs() -> None:
    ours, plain = adapter(), adapter()
    config = TrainConfig(steps=1, lr=1e-2, cell_lr=3e-3, head_lr=5e-3, weight_decay=0.1, clip_norm=0.5)
    lane = LaneOptimizer(ours, config, ALONE, zero_stage=0)
    rates = {"prompt": 1e-2, "cell": 3e-3, "head": 5e-3}
    groups = [
        {"params": [p for n, p in plain.named_parameters() if n.startswith(part)], "lr": rate}
        for part, rate in rates.items()
    ]
    reference = torch.optim.AdamW(groups, weight_decay=0.1)
    for step in range(4):
        for module in (ours, plain):
            generator = torch.Generator().manual_seed(step)
            for parameter in module.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        reduced = reduce_gradients([lane], torch.zeros(1), 0)
        lane.apply(reduced.norms[0])
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        reference.step()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_lanes_have_norms_and_fates_of_their_own() -> None:
    first, second = adapter(0), adapter(1)
    config = TrainConfig(steps=1)
    lanes = [LaneOptimizer(lane, config, ALONE, 0) for lane in (first, second)]
    for parameter in first.parameters():
        parameter.grad = torch.ones_like(parameter)
    for parameter in second.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    reduced = reduce_gradients(lanes, torch.tensor([1.0, 2.0]), 0)
    assert reduced.sums == [1.0, 2.0]
    assert reduced.norms[0] == pytest.approx(math.sqrt(sum(p.numel() for p in first.parameters())))
    assert math.isnan(reduced.norms[1])


def test_every_tensor_has_one_owner_and_the_load_is_spread() -> None:
    named = dict(adapter().named_parameters())
    owners = _owners(named, 2)
    assert owners.keys() == named.keys()
    load = [sum(p.numel() for n, p in named.items() if owners[n] == rank) for rank in (0, 1)]
    assert max(load) - min(load) <= max(p.numel() for p in named.values())
