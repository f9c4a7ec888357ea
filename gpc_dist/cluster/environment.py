"""`gpc-dist doctor`: report what this machine has, what is missing, and the remedy."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tabulate import tabulate

from gpc_dist.config import EncoderConfig
from gpc_dist.encoder import frozen
from gpc_dist.errors import EXIT_DONE, EXIT_ENVIRONMENT, MachineError, UserError
from gpc_dist.private import CHECKED, check_version

_FREE_GIB = 5.0


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    found: str
    remedy: str = ""
    """What to do; empty if nothing is wrong."""
    optional: bool = False
    """Training works without it."""


def examine() -> Iterator[Finding]:
    """Yield the findings one by one, because some take seconds."""
    yield Finding("python", platform.python_version())
    for name in ("torch", "transformers", "deepspeed", "datasets", "mlflow", "pydantic"):
        yield _package(name)
    yield _gpus()
    yield _cores()
    yield _loopback()
    yield _disk()
    yield _demo_encoder()


def _package(name: str) -> Finding:
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "not installed", "pip install gpc-dist")
    try:
        if name in CHECKED:
            check_version(name)
    except MachineError as error:
        return Finding(name, found, str(error))
    return Finding(name, found)


def _gpus() -> Finding:
    import torch

    count = torch.cuda.device_count()
    if count:
        names = {torch.cuda.get_device_name(i) for i in range(count)}
        return Finding("GPUs", f"{count} ({', '.join(sorted(names))}), CUDA {torch.version.cuda}")
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        remedy = "this torch is a CPU build: install one with CUDA (pytorch.org) to use the GPUs"
        return Finding("GPUs", "none usable", remedy)
    return Finding("GPUs", "none: runs use the CPU over gloo", "a GPU is faster", optional=True)


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Finding("CPU", f"{cores} cores, {memory_gib:.0f} GiB")


def _loopback() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)):
            return Finding("rendezvous", "loopback ports can be opened")
    except OSError as error:
        return Finding("rendezvous", str(error), "allow loopback TCP: several ranks need it")


def _disk() -> Finding:
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    remedy = "" if free_gib > _FREE_GIB else f"free some space: less than {_FREE_GIB:.0f} GiB is left"
    return Finding("disk", f"{free_gib:.0f} GiB free in {Path.cwd()}", remedy)


def _demo_encoder() -> Finding:
    try:
        return Finding("demo encoder", Path(frozen.encoder_path(EncoderConfig())).parent.name)
    except UserError as error:
        return Finding("demo encoder", "not installed", str(error), optional=True)


def report(findings: Iterable[Finding]) -> int:
    """Print findings; return the exit code."""
    found = list(findings)
    marks = {f: "ok" if not f.remedy else "--" if f.optional else "!!" for f in found}
    lines = [[marks[f], f.what, f.found, f.remedy] for f in found]
    print(tabulate(lines, headers=["", "what", "found", "to do"]))
    failed = list(marks.values()).count("!!")
    print("\nready to train" if not failed else f"\n{failed} thing(s) to mend")
    return EXIT_ENVIRONMENT if failed else EXIT_DONE
