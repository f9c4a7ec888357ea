"""GPU telemetry: one thread on each node samples its GPUs through NVML; none on nodes without GPUs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import count
from typing import Any

Write = Callable[[int, dict[str, float]], None]
"""Takes a sample's number and its figures."""


class GpuTelemetry:
    """Samples every GPU of the node from a thread of its own.

    Args:
        open_log: opens the log of the samples, in the sampling thread; not called on a node without GPUs. A
            sample has `gpu<i>/memory_used_mib`, `/utilisation_pct`, `/power_w` and `/energy_j` (since the start);
            figures that the driver does not give are left out.
        enabled: whether this rank samples for its node.
        period_s: seconds between samples.
    """

    def __init__(
        self,
        open_log: Callable[[], AbstractContextManager[Write]],
        enabled: bool = True,
        period_s: float = 10.0,
    ):
        self.energy_j: float | None = None
        """Energy (J) of the node's GPUs from the start to the last sample; None if the driver does not give it."""
        self._open_log = open_log
        self._period_s = period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-telemetry", daemon=True)
        self._handles = _open_gpus() if enabled else []

    def __enter__(self) -> GpuTelemetry:
        if self._handles:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._handles:
            self._thread.join()

    def _run(self) -> None:
        start = [_energy_j(handle) for handle in self._handles]
        with self._open_log() as write:
            for number in count():
                ended = self._stop.wait(self._period_s)
                write(number, self._take(start))
                if ended:
                    return

    def _take(self, start: list[float | None]) -> dict[str, float]:
        """Sample all GPUs and update `energy_j`; `start` has their energy counters (J) at the start."""
        sample: dict[str, float] = {}
        for index, (handle, base) in enumerate(zip(self._handles, start, strict=True)):
            sample |= {f"gpu{index}/{name}": value for name, value in _sample(handle).items()}
            total = _energy_j(handle)
            if base is not None and total is not None:
                sample[f"gpu{index}/energy_j"] = total - base
        spent = [value for name, value in sample.items() if name.endswith("/energy_j")]
        self.energy_j = sum(spent) if spent else None
        return sample


def _open_gpus() -> list[Any]:
    import pynvml

    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
    except pynvml.NVMLError:
        return []


def _sample(handle: Any) -> dict[str, float]:
    import pynvml

    readings = {
        "memory_used_mib": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used / 2**20,
        "utilisation_pct": lambda: float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }
    sample = {}
    for name, read in readings.items():
        try:
            sample[name] = read()
        except pynvml.NVMLError:
            continue
    return sample


def _energy_j(handle: Any) -> float | None:
    import pynvml

    try:
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except pynvml.NVMLError:
        return None
