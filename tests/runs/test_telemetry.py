"""GPU telemetry against a driver that answers, one that answers in part, and none."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from gpc_dist.runs.telemetry import GpuTelemetry, Write


class NVMLError(Exception):
    pass


def driver(gpus: int, power: bool = True) -> types.ModuleType:
    """An NVML with so many GPUs, 1 GiB of memory used, 50 % busy, and an energy counter that moves."""
    module: Any = types.ModuleType("pynvml")
    energy = iter(range(1000, 10**9, 1000))

    def init() -> None:
        if not gpus:
            raise NVMLError

    def power_mw(_: int) -> int:
        if not power:
            raise NVMLError
        return 300_000

    module.NVMLError = NVMLError
    module.nvmlInit = init
    module.nvmlDeviceGetCount = lambda: gpus
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceGetMemoryInfo = lambda _: types.SimpleNamespace(used=2**30)
    module.nvmlDeviceGetUtilizationRates = lambda _: types.SimpleNamespace(gpu=50)
    module.nvmlDeviceGetPowerUsage = power_mw
    module.nvmlDeviceGetTotalEnergyConsumption = lambda _: next(energy)
    return module


def samples(monkeypatch: pytest.MonkeyPatch, module: types.ModuleType) -> tuple[list[Any], float | None]:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    found: list[Any] = []

    @contextmanager
    def log() -> Iterator[Write]:
        yield lambda number, sample: found.append(sample)

    with GpuTelemetry(log, period_s=60) as telemetry:
        pass
    return found, telemetry.energy_j


def test_the_last_sample_is_taken_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    found, energy_j = samples(monkeypatch, driver(gpus=2))
    (sample,) = found
    for gpu in ("gpu0", "gpu1"):
        assert sample[f"{gpu}/memory_used_mib"] == 1024
        assert sample[f"{gpu}/utilisation_pct"] == 50
        assert sample[f"{gpu}/power_w"] == 300
        assert sample[f"{gpu}/energy_j"] == 2  # the fake counter moves 1 J a reading, two GPUs in turn
    assert energy_j == 4


def test_a_figure_the_driver_does_not_give_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ((sample,), _) = samples(monkeypatch, driver(gpus=1, power=False))
    assert "gpu0/power_w" not in sample
    assert sample["gpu0/utilisation_pct"] == 50


def test_no_gpu_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert samples(monkeypatch, driver(gpus=0)) == ([], None)
