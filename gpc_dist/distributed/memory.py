"""Memory of this process and its host: the most it has held, what it may still take, and giving freed pages back."""

from __future__ import annotations

import ctypes
import resource
from contextlib import suppress
from pathlib import Path

import psutil
import torch

_M_MMAP_THRESHOLD = -3
"""Of glibc's `mallopt`."""

CGROUPS = Path("/sys/fs/cgroup")
"""Where the kernel shows control groups (version 2)."""


def peak_memory_mib(device: torch.device) -> float:
    """Most memory this process has held so far: of its GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def available_bytes() -> int:
    """Memory of this host that this process may still take: of the machine, or of its control group (as a
    container or a Slurm job has it) where that leaves less."""
    return min([psutil.virtual_memory().available, *_left_in_groups()])


def _left_in_groups() -> list[int]:
    """What the limits of this process's control group and of those above it leave."""
    try:
        own = Path("/proc/self/cgroup").read_text().partition("0::/")[2].strip()
    except OSError:
        return []
    left = []
    for group in (CGROUPS / own, *(CGROUPS / own).parents):
        try:
            limit = (group / "memory.max").read_text().strip()
            used = int((group / "memory.current").read_text())
            # cached file pages are given back when memory is short
            cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if limit != "max":
            left.append(max(0, int(limit) - used + int(cached.get("inactive_file", 0))))
    return left


def return_freed_memory() -> None:
    """Have the C library give freed tensors of 1 MiB and more back to the system at once.

    By default glibc keeps them, in a heap that fragments: a T5-base shape with activation checkpointing on
    8 x 148 tokens, 187 MiB of tensors at once, was seen to hold 690 MiB, and 206 MiB after this. New pages must
    then be asked for again and again, which took a fifth longer. Does nothing where there is no glibc.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)
