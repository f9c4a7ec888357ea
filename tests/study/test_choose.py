"""Which configuration of a method is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpc_dist.runs.folder import TrialFolder
from gpc_dist.study.choose import Tried, choose


def run(method: str, lr: float, seed: int, value: float | None, metric: str = "accuracy") -> Tried:
    best = {} if value is None else {"main_metric": metric, "metrics": {"best": {metric: value}}}
    return Tried(TrialFolder(Path("t")), method, {"train.lr": lr}, seed, best)


def test_the_best_mean_over_seeds_is_taken() -> None:
    trials = [
        run("gpc", 0.1, 0, 0.9),
        run("gpc", 0.1, 1, 0.5),
        run("gpc", 0.2, 0, 0.75),
        run("gpc", 0.2, 1, 0.75),
    ]
    assert choose(trials, 2) == {
        "gpc": {"configuration": {"train.lr": 0.2}, "metric": "accuracy", "holdout": pytest.approx(0.75)}
    }


def test_less_is_better_of_an_error() -> None:
    trials = [run("gpc", 0.1, 0, 0.9, "rmse"), run("gpc", 0.2, 0, 0.4, "rmse")]
    assert choose(trials, 1)["gpc"]["configuration"] == {"train.lr": 0.2}


def test_a_configuration_that_failed_with_one_seed_is_not_taken() -> None:
    trials = [
        run("gpc", 0.1, 0, 0.9),
        run("gpc", 0.1, 1, None),
        run("gpc", 0.2, 0, 0.6),
        run("gpc", 0.2, 1, 0.6),
        run("prompt-tuning", 0.1, 0, None),
        run("prompt-tuning", 0.1, 1, 0.9),
    ]
    found = choose(trials, 2)
    assert list(found) == ["gpc"]
    assert found["gpc"]["configuration"] == {"train.lr": 0.2}


def test_a_value_that_is_not_finite_is_none() -> None:
    assert run("gpc", 0.1, 0, float("nan")).value is None
