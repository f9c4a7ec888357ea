"""Measurements: spans add up, and figures come out where there is something to measure."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gpc_dist.bench import machine
from gpc_dist.bench.machine import communication, covered, matmul_tflops
from gpc_dist.distributed.world import World

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("spans", "length"),
    [
        ([], 0),
        ([(3, 5), (1, 2)], 3),
        ([(1, 4), (2, 3)], 3),
        ([(1, 3), (2, 5), (5, 6)], 5),
    ],
)
def test_covered_counts_no_moment_twice(spans: list[tuple[float, float]], length: float) -> None:
    assert covered(spans) == length


def test_the_speed_of_the_matrix_product_is_the_best_of_about_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the end of the second is set; four products in 0.4 s; still in time: four in 0.8 s; out of time
    clock = iter([0.0, 0.0, 0.4, 0.4, 0.4, 1.2, 1.2])
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    operations = 2 * 1024**3
    assert matmul_tflops(CPU, torch.float32) == pytest.approx(operations / 0.1 / 1e12)
    assert list(clock) == []


def test_a_lone_rank_does_not_communicate() -> None:
    spent = communication(lambda: None, World(0, 1, 0, CPU))
    assert spent.busy == spent.exposed == 0
