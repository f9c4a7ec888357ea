"""Losses against plain re-computations, and what of a pass a lane is charged."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from gpc_dist.bench.synthetic import synthetic
from gpc_dist.config import DataConfig, TaskConfig, TrainConfig
from gpc_dist.tasks import Batch, Example, make_task
from gpc_dist.training.losses import class_weights, split_outputs, summed_loss
from gpc_dist.training.session import Split
from gpc_dist.training.step import LaneExamples


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


def test_balanced_weights_are_those_of_scikit_learn_and_weigh_each_example() -> None:
    targets = np.array([0, 0, 0, 0, 0, 3, 3, 1])  # no 2 and no 4
    weights = class_weights(TrainConfig(class_weights="balanced"), targets, 5)
    assert weights is not None
    reference = compute_class_weight("balanced", classes=np.unique(targets), y=targets)
    assert weights.tolist() == pytest.approx([reference[0], reference[1], 0, reference[2], 0])
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    one_by_one = torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none")
    loss = summed_loss("classification", logits, batch([1] * 8, torch.tensor(targets)), weights)
    assert loss.item() == pytest.approx((weights[targets] * one_by_one).sum().item(), rel=1e-6)
    assert weights[targets].mean().item() == pytest.approx(1)
    half = summed_loss("classification", logits.bfloat16(), batch([1] * 8, torch.tensor(targets)), weights)
    assert half.item() == pytest.approx(loss.item(), rel=0.02)
    assert class_weights(TrainConfig(), targets, 5) is None


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


def test_the_time_of_a_pass_is_shared_by_tokens() -> None:
    """Lanes of one pass may have rows of very different lengths."""
    split = Split([], synthetic(np.array([3, 7, 5]), 100, seed=0))
    adapter: Any = SimpleNamespace(prompt_tokens=4)
    work = [
        LaneExamples(adapter, split, np.array(own, np.int64), "classification").work
        for own in ([0, 2], [1], [])
    ]
    assert work == [3 + 5 + 2 * 4, 7 + 4, 0]
