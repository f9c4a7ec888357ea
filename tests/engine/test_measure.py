"""Measurements: spans add up, and figures come out where there is something to measure."""

from __future__ import annotations

import pytest
import torch

from gpc_dist.engine.distributed import World
from gpc_dist.engine.measure import communication, covered, matmul_tflops, peak_memory_mib

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


def test_the_matrix_product_has_a_speed() -> None:
    assert matmul_tflops(CPU, torch.float32) > 0


def test_peak_memory_never_falls() -> None:
    before = peak_memory_mib(CPU)
    held = torch.ones(32 * 2**18)
    assert peak_memory_mib(CPU) >= before > 0
    del held


def test_a_lone_rank_does_not_communicate() -> None:
    spent = communication(lambda: None, World(0, 1, 0, CPU))
    assert spent.busy == spent.exposed == 0
