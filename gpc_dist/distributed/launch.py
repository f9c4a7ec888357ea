"""Ranks on this machine: finding out whether this process is one, and starting them."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from gpc_dist.config import EngineConfig
from gpc_dist.errors import EXIT_ENVIRONMENT, MachineError, UserError
from gpc_dist.interpreter import python

log = logging.getLogger(__name__)

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
_GRACE_S = 20.0
LOST = "another rank is gone"
"""Begins what a rank says that has lost another."""
SECRET = "GPC_DIST_SECRET"
"""Environment variable: what the ranks of a job know, and nobody else (see `rendezvous`). Whoever starts ranks makes a
new one; under `torchrun` the user may give one."""
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_LAST_STEP = 0xFFFFFFF0
"""Slurm's largest id of a step; those above are of batch scripts, interactive shells and the like."""
_PR_SET_PDEATHSIG = 1
"""`prctl` option: the signal that the kernel sends a process when the thread that started it ends."""
_STARTED_S = "GPC_DIST_STARTED_S"
"""Environment variable that tells ranks when the user's command began."""


def given_ranks() -> bool:
    """Whether `torchrun`, `srun` or `start_ranks` has already made this process one rank of several.

    Under `srun` the rank is read from Slurm's variables; the batch script exports MASTER_ADDR and
    MASTER_PORT. Variables of a single rank, as containers and notebooks leave them, are removed.

    Raises:
        UserError: the variables contradict each other.
    """
    size = _number("WORLD_SIZE") if "RANK" in os.environ else None
    if size is not None and (size > 1 or "TORCHELASTIC_RUN_ID" in os.environ):
        if _number("RANK") >= size:
            raise UserError(f"RANK={os.environ['RANK']} and WORLD_SIZE={size} in the environment: unset them")
        _say_given("RANK and WORLD_SIZE")
        return True
    if left := forget_ranks():
        log.info("%s in the environment: not used, it names no other rank", " ".join(left))
    tasks = _number("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS")
    if in_job_step() and tasks > 1:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = str(tasks)
        os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
        _say_given("SLURM_PROCID and SLURM_STEP_NUM_TASKS")
        return True
    return False


def forget_ranks() -> list[str]:
    """Remove the variables of a rank from the environment; returns what they were."""
    return [f"{name}={os.environ.pop(name)}" for name in _OF_A_RANK if name in os.environ]


def without_local_rank(words: Sequence[str]) -> list[str]:
    """The words of a command line without the `--local_rank=N` that the `deepspeed` launcher puts before them; the
    environment says it as well."""
    return list(words[1:] if words and re.fullmatch(r"--local[_-]rank=\d+", words[0]) else words)


def in_job_step() -> bool:
    """Whether `srun` started this process, or one that it runs in, as a task of a job step.

    Neither a batch script is one, nor a shell that `salloc` or `srun --pty` opened: what a person starts there is
    alone, whatever its variables say.
    """
    step = os.environ.get("SLURM_STEP_ID", "")
    if "SLURM_PROCID" not in os.environ or not step.isdecimal() or int(step) > _LAST_STEP:
        return False
    return "SLURM_PTY_PORT" not in os.environ or _parent() == "slurmstepd"


def _parent() -> str:
    """Name of the program that started this process; empty where the system does not say."""
    try:
        return Path(f"/proc/{os.getppid()}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _number(name: str) -> int:
    """The value of an environment variable; 1 where it is not set."""
    text = os.environ.get(name, "1")
    if not text.isdecimal():
        raise UserError(f"{name}={text} in the environment is no number: unset it")
    return int(text)


def _say_given(names: str) -> None:
    if _STARTED_S not in os.environ:  # else `run_as_ranks` gave them
        rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
        log.info("rank %s of %s, as %s in the environment say; engine.ranks is not used", rank, size, names)


def wanted_ranks(config: EngineConfig) -> int:
    """`engine.ranks`, or with `auto` one for each visible GPU and at least one."""
    if config.ranks != "auto":
        return config.ranks
    return 1 if config.device == "cpu" else max(1, visible_gpus())


def fitting_ranks(config: EngineConfig) -> int:
    """`wanted_ranks`, but no more than this machine has visible GPUs, or cores where it runs on these."""
    gpus = 0 if config.device == "cpu" else visible_gpus()
    return min(wanted_ranks(config), gpus or _cores())


def command_started_s() -> float:
    """Unix time at which the user's command began, also in the ranks that it started."""
    return float(os.environ.get(_STARTED_S, time.time()))


def run_as_ranks(config: EngineConfig, words: Sequence[str]) -> int | None:
    """Run this command as several ranks, if several are wanted and none were given.

    Args:
        words: arguments of the command line after `gpc-dist`.

    Returns:
        The exit code; None when this process is to run the command itself.
    """
    ranks = wanted_ranks(config)
    if given_ranks() or ranks == 1:
        return None
    os.environ.setdefault(_STARTED_S, str(time.time()))
    return start_ranks(python("gpc_dist", *words), ranks)


def start_ranks(command: Sequence[str], ranks: int) -> int:
    """Run `command` once for each rank on this machine and wait for all of them.

    Signals are passed on; when a rank fails, the others are ended. Only rank 0 writes to the terminal; the error output
    of another rank is shown if that one failed and rank 0 did not, or may have lost it.

    Returns:
        0, or the exit code of the rank that failed (128 + n for signal n); of several, one that a signal ended comes
        first, and one that says that it has lost another comes last.
    """
    environment = dict(os.environ)
    environment.update(
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(_free_port()),
        **{SECRET: secrets.token_hex(32)},
    )
    environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // ranks)))
    with ExitStack() as stack:
        errors = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(ranks - 1)]
        processes = [
            subprocess.Popen(
                command,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=None if rank == 0 else subprocess.DEVNULL,
                stderr=None if rank == 0 else errors[rank - 1],
                start_new_session=True,  # a Ctrl-C reaches the ranks once, through us
                preexec_fn=_tie_to(os.getpid()),
            )
            for rank in range(ranks)
        ]

        def forward(number: int, _: object) -> None:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(number)

        for number in FORWARDED:
            stack.callback(signal.signal, number, signal.signal(number, forward))
        return _wait(processes, errors)


def _tie_to(launcher: int) -> Callable[[], None] | None:
    """What a rank runs before its program, so that it ends with its launcher, however that ends; None where the
    system cannot do so."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: between fork and exec nothing may be imported

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != launcher:  # it ended before that
            os._exit(1)

    return tie


def _wait(processes: list[subprocess.Popen[bytes]], errors: Sequence[IO[bytes]]) -> int:
    while not _failed(processes) and any(p.poll() is None for p in processes):
        time.sleep(0.05)
    if not _failed(processes):
        return 0
    # ranks that fail for the same reason fail together: give them time to report it
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline and any(p.poll() is None for p in processes):
        time.sleep(0.05)
    failed = _failed(processes)
    ended_by_us = [p for p in processes if p.poll() is None]
    _end(ended_by_us)
    said = ["", *map(_text, errors)]
    first = min(failed, key=lambda rank: (_follows(rank, processes[rank].returncode, said[rank]), rank))
    code = processes[first].returncode
    silent = processes[0].returncode in (0, EXIT_ENVIRONMENT) or processes[0] in ended_by_us
    if first > 0 and (silent or code < 0):
        log.error("rank %d ended with %s\n%s", first, _describe(code), said[first][-8000:])
    return 128 - code if code < 0 else code


def _follows(rank: int, code: int, said: str) -> int:
    """How likely a rank failed because of another one, from 0: what rank 0 said is not known here."""
    if code < 0:
        return 0
    if LOST in said:
        return 3
    return 2 if rank == 0 and code == EXIT_ENVIRONMENT else 1


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _failed(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    return [rank for rank, p in enumerate(processes) if p.poll() not in (None, 0)]


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE_S
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _describe(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def visible_gpus() -> int:
    """The number of visible GPUs, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        return 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 0))
        except OSError as error:
            raise MachineError(f"no free port on the loopback interface: {error}") from None
        return probe.getsockname()[1]
