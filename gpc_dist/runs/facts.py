"""Facts of a run: its machine, code and command (`facts.json`).

Of the environment only variables of the Slurm job are recorded, because others may hold secrets.
"""

from __future__ import annotations

import getpass
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import gpc_dist
from gpc_dist.shown import redact

_PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "mlflow",
    "ray",
)


def collect_facts(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The facts of this process: strings, numbers, `git_dirty` and `versions` (package -> version).

    Unknown facts (no git, no GPU) are left out. Callers add facts of their own, such as `dataset` and
    `signature`; `tracking.run_exporter` exports them.

    Args:
        argv: the command to reproduce the run; `sys.argv` when not given.
    """
    return {
        "command": _command(sys.argv if argv is None else argv),
        "folder": str(Path.cwd()),
        "host": socket.gethostname(),
        **_user(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count() or 1,
        "memory_gib": _memory_gib(),
        **_gpus(),
        **_slurm(),
        **git_revision(Path.cwd()),
        "versions": package_versions(),
    }


def _command(argv: Sequence[str]) -> str:
    program = Path(argv[0]).name if argv else ""
    return redact(shlex.join([program, *argv[1:]]))


def _user() -> dict[str, str]:
    try:
        return {"user": getpass.getuser()}
    except (KeyError, OSError):  # a container may run under an id without a name
        return {}


def cpu_name() -> str:
    """The CPU's product name if Linux gives one, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _memory_gib() -> float:
    """Memory of the whole machine in GiB, even if a batch system allows only a part of it."""
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _gpus() -> dict[str, str | int]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, no GPU: each has its own error
        return {}
    try:
        count = pynvml.nvmlDeviceGetCount()
        names = {pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)}
        return {"gpu": ", ".join(sorted(names)), "gpus": count} if count else {}
    except pynvml.NVMLError:
        return {}
    finally:
        pynvml.nvmlShutdown()


_SLURM = {
    "slurm_job_id": "SLURM_JOB_ID",
    "slurm_array_job_id": "SLURM_ARRAY_JOB_ID",
    "slurm_array_task_id": "SLURM_ARRAY_TASK_ID",
    "slurm_nodes": "SLURM_JOB_NODELIST",
    "slurm_partition": "SLURM_JOB_PARTITION",
    "slurm_restarts": "SLURM_RESTART_COUNT",
}


def _slurm() -> dict[str, str]:
    """Facts of the Slurm job that runs this process; empty outside of one."""
    return {fact: os.environ[name] for fact, name in _SLURM.items() if name in os.environ}


def git_revision(folder: Path) -> dict[str, str | bool]:
    """`git_commit` and `git_dirty` (whether tracked files differ from it); empty outside of a repository."""
    commit = _git_output(folder, "rev-parse", "HEAD")
    if commit is None:
        return {}
    changes = _git_output(folder, "status", "--porcelain", "--untracked-files=no")
    return {"git_commit": commit, "git_dirty": bool(changes)}


def _git_output(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):  # no git, or a slow network file system
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def package_versions() -> dict[str, str]:
    """Versions of this program and of the installed packages that matter for a run."""
    found = {"gpc-dist": gpc_dist.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
