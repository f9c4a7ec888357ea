"""Measurements of this machine: the speed of its matrix products, and the time in collectives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from gpc_dist.distributed.world import World

Span = tuple[float, float]


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its queue; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak speed of matrix products, in 10^12 FLOPs per second: the best of a large square product, repeated for
    about a second. All ranks of a machine should measure at the same time."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best_s, end = float("inf"), time.perf_counter() + 1.0
    while best_s == float("inf") or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        synchronize(device)
        best_s = min(best_s, (time.perf_counter() - start) / 4)
    return 2 * size**3 / best_s / 1e12


@dataclass(frozen=True)
class Communication:
    """Shares, from 0 to 1, of the time of steps on this rank."""

    busy: float
    """A collective was running, waiting for slower ranks included."""
    exposed: float | None
    """A collective and nothing else was running on the GPU; None on a CPU, where this cannot be measured."""


def communication(run: Callable[[], object], world: World) -> Communication:
    """The shares of collectives in `run`, from a profile of it. All ranks must call it."""
    if world.size == 1:
        return Communication(0.0, 0.0)
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = world.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        synchronize(world.device)
        start = time.perf_counter()
        run()
        synchronize(world.device)
        seconds = time.perf_counter() - start
    collectives: list[Span] = []
    others: list[Span] = []
    for event in profiled.events() or ():
        if on_gpu and (event.device_type is not DeviceType.CUDA or event.is_user_annotation):
            continue
        span = (event.time_range.start, event.time_range.end)
        # names of nccl's kernels, or of gloo's spans, which last from the call to the end, in any thread
        if event.name.startswith("nccl" if on_gpu else "gloo:"):
            collectives.append(span)
        elif on_gpu:
            others.append(span)
    busy_s = covered(collectives) / 1e6
    exposed_s = (covered([*collectives, *others]) - covered(others)) / 1e6
    return Communication(busy_s / seconds, exposed_s / seconds if on_gpu else None)


def covered(spans: Iterable[Span]) -> float:
    """Length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
