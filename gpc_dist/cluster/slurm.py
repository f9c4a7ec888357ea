"""Slurm's commands: every call this program makes of them is here.

Tables are read as text, the field that may say anything at the end of its line. `--json` has no partitions in Slurm
22.05's sinfo; its squeue lists the jobs of all users whatever `--me` says, and folds the waiting tasks of an array.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gpc_dist.errors import MachineError, UserError

ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}
"""States a job does not leave by itself."""

_TIMEOUT_S = 60


@dataclass(frozen=True)
class Partition:
    """A partition of the cluster. Its nodes may differ: each figure is the largest of them."""

    name: str
    is_default: bool
    is_up: bool
    nodes: int
    max_s: int | None
    """Longest time limit in seconds; None when there is none."""
    cpus: int
    """Of a node."""
    memory_mib: int
    """Of a node."""
    gpus: int
    """Of a node."""
    gpu_type: str
    """As Slurm names it; empty where it does not."""


@dataclass(frozen=True)
class Job:
    """A job, or one task of an array, as Slurm sees it."""

    id: str
    """`123`, or `123_4` for a task of an array."""
    state: str
    elapsed: str
    nodes: str
    partition: str
    reason: str
    """Why it waits, or how it ended: any text."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def call(*words: str) -> str:
    """What a command of Slurm prints.

    Raises:
        MachineError: the command is not there, or its controller does not answer.
        UserError: it refuses; the message is Slurm's own.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except FileNotFoundError:
        raise MachineError(
            f"there is no '{words[0]}' here: run this on a login node of a Slurm cluster, or use gpc-dist train"
        ) from None
    except subprocess.TimeoutExpired:
        raise MachineError(
            f"'{words[0]}' did not answer for {_TIMEOUT_S} s: is Slurm's controller up (scontrol ping)?"
        ) from None
    if done.returncode:
        said = re.sub(rf"^{words[0]}: (error: |fatal: )?", "", done.stderr.strip(), flags=re.MULTILINE)
        unreachable = re.search(
            r"contact slurm controller|communication connection|configuration source", said
        )
        raise (MachineError if unreachable else UserError)(f"{words[0]}: {said or done.returncode}")
    return done.stdout


def partitions() -> list[Partition]:
    """The cluster's partitions, in Slurm's order."""
    found: dict[str, Partition] = {}
    for line in call("sinfo", "--noheader", "--format=%P|%a|%l|%D|%c|%m|%G").splitlines():
        name, up, limit, nodes, cpus, memory, gres = line.split("|", 6)
        gpus, gpu_type = _gpus(gres)
        new = Partition(
            name=name.rstrip("*"),
            is_default=name.endswith("*"),
            is_up=up == "up",
            nodes=int(nodes),
            max_s=seconds(limit),
            cpus=int(cpus.rstrip("+")),
            memory_mib=int(memory.rstrip("+")),
            gpus=gpus,
            gpu_type=gpu_type,
        )
        old = found.get(new.name)
        found[new.name] = _together(old, new) if old else new
    return list(found.values())


def _together(a: Partition, b: Partition) -> Partition:
    """Two groups of nodes of one partition."""
    return replace(
        a,
        nodes=a.nodes + b.nodes,
        cpus=max(a.cpus, b.cpus),
        memory_mib=max(a.memory_mib, b.memory_mib),
        gpus=max(a.gpus, b.gpus),
        gpu_type=a.gpu_type or b.gpu_type,
    )


def _gpus(gres: str) -> tuple[int, str]:
    """GPUs and their type in generic resources such as `gpu:a100:8(S:0-1),lustre:1`."""
    found = re.findall(r"\bgpu(?::([^:,()]+))?:(\d+)\b", gres)
    return sum(int(count) for _, count in found), next((kind for kind, _ in found if kind), "")


def seconds(limit: str) -> int | None:
    """Seconds of a time limit as Slurm writes it (`90`, `1:30:00`, `2-12:00:00`); None for no limit.

    Raises:
        UserError: it is not one.
    """
    if limit.lower() in ("infinite", "unlimited"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        raise UserError(f"'{limit}' is not a time limit: give minutes, H:MM:SS or D-HH:MM:SS")
    days, *parts = (int(part) if part else None for part in match.groups())
    given = [part for part in parts if part is not None]
    if days is not None:
        units = [3600, 60, 1]  # days-hours, days-hours:minutes, ...
    else:
        units = [60] if len(given) == 1 else [60, 1] if len(given) == 2 else [3600, 60, 1]
    return 86400 * (days or 0) + sum(unit * part for unit, part in zip(units, given, strict=False))


def submit(options: Sequence[str], script: Path, arguments: Sequence[str]) -> str:
    """Submit a batch script; returns the job's id."""
    words = ["sbatch", "--parsable", *options, str(script), *arguments]
    return call(*words).strip().split(";")[0]


def try_out(options: Sequence[str], script: Path, arguments: Sequence[str]) -> None:
    """Let Slurm say what it would refuse; raises `UserError`."""
    call("sbatch", "--test-only", *options, str(script), *arguments)


def jobs(ids: Iterable[str]) -> dict[str, Job]:
    """Those of these jobs that Slurm still knows: the waiting, the running and the recently ended."""
    wanted = set(ids)
    if not wanted:
        return {}
    found = {}
    lines = call("squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%T|%M|%N|%P|%r")
    for line in lines.splitlines():
        number, *fields = line.split("|", 5)
        if number in wanted:  # which the later lines of a reason are not
            found[number] = Job(number, *fields)
    return found


def cancel(ids: Sequence[str]) -> None:
    """End jobs, or tasks of arrays. Those that have ended are left alone."""
    call("scancel", *ids)
