"""Slurm's sinfo, sbatch, squeue and scancel: all calls of these commands are here.

Tables are read as text, with a free-text field at the end of its line. `--json` is not used: in Slurm 22.05, sinfo
gives no partitions with it; squeue ignores `--me` and merges the waiting tasks of an array into one entry.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gpc_dist.errors import MachineError, UserError
from gpc_dist.shown import shown

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
"""States of a job that has ended."""

_ID = re.compile(r"\d+(_\d+)?", re.ASCII)
_MOST_NUMBERS = 1_000_000
_TIMEOUT_S = 60


@dataclass(frozen=True)
class Partition:
    """A partition of the cluster. Its nodes may differ: a figure of a node is the largest among them."""

    name: str
    is_default: bool
    is_up: bool
    nodes: int
    max_s: int | None
    """Longest time limit in seconds; None if there is none."""
    cpus: int
    """Of a node."""
    memory_mib: int
    """Of a node."""
    gpus: int
    """Of a node."""
    gpu_type: str
    """Slurm's name of the GPU type; empty if it gives none."""


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
    """Why the job waits, or how it ended; free text."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def is_job_id(text: object) -> bool:
    """Whether it is a `Job.id`: what a file says may be anything, an option of Slurm's programs for example."""
    return isinstance(text, str) and _ID.fullmatch(text) is not None


def call(*words: str) -> str:
    """Run a command of Slurm and return its output.

    Raises:
        MachineError: the command is not installed, or Slurm's controller does not answer.
        UserError: the command fails; the message is Slurm's.
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
    """The cluster's partitions, in Slurm's order.

    Raises:
        MachineError: Slurm's answer has another form.
    """
    found: dict[str, Partition] = {}
    for line in call("sinfo", "--noheader", "--format=%P|%a|%l|%D|%c|%m|%G").splitlines():
        try:
            new = _partition(*line.split("|", 6))
        except (TypeError, ValueError, UserError):
            raise MachineError(f"sinfo says of a partition what is not understood: {shown(line)}") from None
        old = found.get(new.name)
        found[new.name] = _together(old, new) if old else new
    return list(found.values())


def _partition(name: str, up: str, limit: str, nodes: str, cpus: str, memory: str, gres: str) -> Partition:
    gpus, gpu_type = _gpus(gres)
    return Partition(
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


def _together(a: Partition, b: Partition) -> Partition:
    """Merge two groups of nodes of one partition."""
    return replace(
        a,
        nodes=a.nodes + b.nodes,
        cpus=max(a.cpus, b.cpus),
        memory_mib=max(a.memory_mib, b.memory_mib),
        gpus=max(a.gpus, b.gpus),
        gpu_type=a.gpu_type or b.gpu_type,
    )


def _gpus(gres: str) -> tuple[int, str]:
    """Number and type of the GPUs in generic resources such as `gpu:a100:8(S:0-1),lustre:1`."""
    found = re.findall(r"\bgpu(?::([^:,()]+))?:(\d+)\b", gres)
    return sum(int(count) for _, count in found), next((kind for kind, _ in found if kind), "")


def largest_array() -> int | None:
    """The most tasks that an array of this cluster can have; None if Slurm does not say."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d{1,9})\b", call("scontrol", "show", "config"), re.MULTILINE)
    return int(found[1]) if found else None


def seconds(limit: str) -> int | None:
    """Seconds of a time limit in Slurm's notation (`90`, `1:30:00`, `2-12:00:00`); None for no limit.

    Raises:
        UserError: `limit` is not a time limit.
    """
    if limit.lower() in ("infinite", "unlimited"):
        return None
    match = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", limit)
    if match is None:
        raise UserError(f"'{shown(limit)}' is not a time limit: give minutes, H:MM:SS or D-HH:MM:SS")
    days, *parts = (int(part) if part else None for part in match.groups())
    given = [part for part in parts if part is not None]
    if days is not None:
        units = [3600, 60, 1]  # days-hours, days-hours:minutes, ...
    else:
        units = [60] if len(given) == 1 else [60, 1] if len(given) == 2 else [3600, 60, 1]
    return 86400 * (days or 0) + sum(unit * part for unit, part in zip(units, given, strict=False))


def numbers(text: str) -> list[int] | None:
    """The numbers of a list in Slurm's notation (`0-3`, `1,5,7`, `0-9:3`); None if `text` is no such list, or one of
    more numbers than any cluster takes."""
    number = r"[0-9]{1,18}"
    if not re.fullmatch(rf"{number}(-{number}(:{number})?)?(,{number}(-{number}(:{number})?)?)*", text):
        return None
    found: list[int] = []
    for first, last, by in re.findall(rf"({number})(?:-({number}))?(?::({number}))?", text):
        part = range(int(first), int(last or first) + 1, max(1, int(by or 1)))
        if len(found) + len(part) > _MOST_NUMBERS:
            return None
        found += part
    return found


def submit(options: Sequence[str], script: Path, arguments: Sequence[str]) -> str:
    """Submit a batch script; return the job's id."""
    words = ["sbatch", "--parsable", *options, str(script), *arguments]
    return call(*words).strip().split(";")[0]


def try_out(options: Sequence[str], script: Path, arguments: Sequence[str]) -> None:
    """Check a submission without submitting it; raises `UserError` if Slurm would refuse it."""
    call("sbatch", "--test-only", *options, str(script), *arguments)


def jobs(ids: Iterable[str]) -> dict[str, Job]:
    """The jobs with these ids, by id, as far as Slurm still knows them: waiting, running or recently ended."""
    wanted = set(ids)
    if not wanted:
        return {}
    found = {}
    lines = call("squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%T|%M|%N|%P|%r")
    for line in lines.splitlines():
        number, *fields = line.split("|", 5)
        if number in wanted and len(fields) == 5:  # false for the further lines of a reason
            found[number] = Job(number, *fields)
    return found


def cancel(ids: Sequence[str]) -> None:
    """Cancel jobs or tasks of arrays; no effect on those that have ended."""
    call("scancel", *ids)
