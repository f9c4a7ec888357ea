"""What the families of faults share: a case, what became of it, and looking for what is left."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from tests import tiny
from tests.processes import Started, start_call


@dataclass(frozen=True)
class Case:
    """A drawn fault: the same for the same kind and seed."""

    kind: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.seed}"


@dataclass
class Outcome:
    """What became of a case."""

    kind: str
    seed: int
    what: str
    """The fault in words: whom it happens to, where and when."""
    injected: int = 0
    """Faults that happened; 0 if nothing came to the place of the fault."""
    code: int | None = None
    """Exit code of the command that the fault happened to; None if there is none, or it hung."""
    said: str = ""
    """Last line of its error output."""
    problems: list[str] = field(default_factory=list)
    """What did not hold."""
    same: bool = False
    """What it led to in the end is what comes without the fault."""
    seconds: float = 0.0


class Family(Protocol):
    """Faults in one sort of thing that the program does.

    Made with a folder that exists: it keeps what the cases share there, which a later campaign uses again, and the
    folders of cases in which something did not hold.
    """

    kinds: tuple[str, ...]
    at_once: int
    """Cases that do not disturb each other on two cores."""

    def draw(self, kind: str, seed: int) -> Any:
        """The case of a kind and a seed."""

    def prepare(self, cases: Iterable[Any]) -> None:
        """Make what cases are compared with."""

    def run(self, case: Any) -> Outcome:
        """Run a case. May be called by `at_once` threads."""

    def close(self) -> None:
        """End what was started for all cases."""


def tiny_inputs(folder: Path) -> Path:
    """A recipe with a tiny encoder and data, made in the folder if it is not there."""
    recipe = folder / "tiny.yaml"
    if not recipe.exists():
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("encoder", "data"):
            (folder / name).mkdir(parents=True)
        start_call(tiny.write_encoder, folder / "encoder").wait()
        tiny.write_data(folder / "data")
        tiny.write_recipe(recipe, folder / "encoder", folder / "data")
    return recipe


def end(started: Started, limit_s: float) -> int | None:
    """Exit code of a command; None if it hung, and was killed."""
    deadline = time.monotonic() + limit_s
    while started.returncode is None and time.monotonic() < deadline:
        time.sleep(0.02)
    code = started.returncode
    if code is None:
        started.kill()
    started.wait()
    return code


def left(living: Callable[[], Iterable[psutil.Process]], within_s: float = 10) -> list[str]:
    """What to say of processes that are still there after a while, which are killed."""
    deadline = time.monotonic() + within_s
    while (found := list(living())) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return [f"process {process.pid} was left" for process in found]


def noted(processes: Path, names: str = "[!.]*") -> Iterator[psutil.Process]:
    """Those that live of the processes that have noted their id and start time in files of this folder."""
    for file in processes.glob(names):
        pid, created_s = file.read_text().split()
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            same = abs(process.create_time() - float(created_s)) < 0.05
            if same and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))
