"""What the benchmarks share: the description of the machine that stands beside every figure."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from typing import Any

from gpc_dist.runs.facts import cpu_name

_PACKAGES = ("torch", "transformers", "deepspeed", "peft", "torchao")


def machine() -> dict[str, Any]:
    """Processor, memory, GPU, versions, and how busy the machine was."""
    import torch

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpus": _gpus(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": versions,
        "load_before": os.getloadavg()[0],
    }


def _gpus() -> list[str]:
    """Name, driver and memory of each; asked of the driver's own tool, because torch would take memory on them."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []
