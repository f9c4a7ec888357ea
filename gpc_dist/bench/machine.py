"""What this machine does, measured: the speed of its matrix products, and time in collectives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from gpc_dist.distributed.world import World

Span = tuple[float, float]


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Best speed of a large square matrix product in about a second of trying, in 10^12 operations per second:
    what a step could reach here if it were nothing else. All ranks of a machine should measure at once."""
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
    """Shares of the time that some steps took, from 0 to 1, on this rank."""

    busy: float
    """A collective was under way; waiting for slower ranks is part of it."""
    exposed: float | None
    """The same with no other work on the GPU meanwhile; None on a CPU, where it cannot be told."""


def communication(run: Callable[[], object], world: World) -> Communication:
    """The share of collectives in `run`, from a profile of it. All ranks must call it."""
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
        # nccl's kernels are named so; gloo's spans last from the call to the end, in whichever thread
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
