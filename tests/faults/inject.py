"""A fault in a run: in the rank where it is to happen, when that rank comes to some place for the n-th time.

`launch` runs in the process that is to be the command. Its ranks are forks of it (`tests.processes`), and so have what
it has patched: each notes its process, so that others can send it signals and the campaign can see whether it is left.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import psutil

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGUSR2")


@dataclass(frozen=True)
class Fault:
    """What happens, where and when."""

    kind: str
    """A signal, or the name of a function `_on_<kind>` here."""
    moment: str
    """Of the run, see `_Watch.patch`."""
    visit: int
    """It happens when the rank comes to a place of the moment for this time, from 1."""
    rank: int
    target: str = "self"
    """Whom a signal is sent: self, launcher or ranks."""
    detail: int = 0
    """Of the kind: an error number, bytes, a bit, milliseconds."""


@dataclass(frozen=True)
class Place:
    """Folders of a case."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def moved(self) -> Path:
        return self.folder / "moved"

    @property
    def processes(self) -> Path:
        """Holds a file for each process, with its id and the time at which it began."""
        return self.folder / "processes"

    @property
    def saved(self) -> Path:
        """Names of the checkpoints whose saves have returned."""
        return self.folder / "saved"

    @property
    def visits(self) -> Path:
        """Holds a file for each moment and rank of a run without a fault, as long as it has visits."""
        return self.folder / "visits"

    @property
    def happened(self) -> Path:
        """There once the fault has begun."""
        return self.folder / "happened"


def launch(words: Sequence[str], place: Path, fault: dict[str, Any] | None) -> int:
    """Run `gpc-dist`, and the fault in it."""
    from gpc_dist import cli
    from tests import processes

    watch = _Watch(Place(place), Fault(**fault) if fault else None)
    watch.note("launcher")
    watch.patch()
    begin = processes._ForkedRank._begin

    def begin_and_note(*arguments: Any) -> None:
        number = arguments[1]["RANK"]
        watch.note(f"rank-{number}")
        begin(*arguments)

    processes._ForkedRank._begin = staticmethod(begin_and_note)
    if "--engine.ranks" in words:
        return processes._launch(list(words))
    watch.note("rank-0")
    return cli.main(words)


class _Watch:
    """Counts the visits of the moment, in each rank by itself."""

    def __init__(self, place: Place, fault: Fault | None):
        self.place, self.fault = place, fault
        self.visits = 0
        self.run: Any = None
        """The `Run`, once it makes steps."""
        self.inside_save = False

    def note(self, name: str) -> None:
        self.place.processes.mkdir(exist_ok=True)
        temporary = self.place.processes / f".{name}"
        temporary.write_text(f"{os.getpid()} {psutil.Process().create_time()}")
        temporary.rename(self.place.processes / name)

    def visit(self, moment: str) -> None:
        fault, rank = self.fault, int(os.environ.get("RANK", "0"))
        if fault is None:
            self.place.visits.mkdir(exist_ok=True)
            with (self.place.visits / f"{moment}-{rank}").open("ab") as file:
                file.write(b".")
        if fault is None or (fault.moment, fault.rank) != (moment, rank):
            return
        self.visits += 1
        if self.visits == fault.visit:
            self.place.happened.touch()
            happen(self, fault)

    def patch(self) -> None:
        from gpc_dist.distributed import checkpoint, launch
        from gpc_dist.training import evaluation, run, train, trainer

        places: dict[str, list[tuple[Any, str]]] = {
            "start": [
                (train, "init_world"),
                (train, "saved_state"),
                (train, "open_folder"),
                (train, "load_base"),
                (train, "open_session"),
                (train, "Run"),
            ],
            "step": [
                (run.Run, "begin_step"),
                (trainer, "backward"),
                (trainer, "finish"),
                (run.Run, "finish_step"),
            ],
            "evaluation": [(evaluation, "lane_batch"), (run.Run, "finish_evaluation"), (run, "save_adapter")],
            "save": [
                (run, "save_state"),
                (checkpoint, "save"),
                (os, "fsync"),
                (os, "rename"),
                (os, "replace"),
            ],
            "prune": [(checkpoint, "prune"), (checkpoint, "remove_folder"), (os, "rmdir"), (os, "unlink")],
            "end": [(run.Run, "close"), (train, "run_result"), (train, "_record_outcome")],
        }
        for moment, functions in places.items():
            for owner, name in functions:
                self._before(moment, owner, name)
        self._note_saves(checkpoint)
        self._note_run(run.Run)
        if self.fault is not None and self.fault.kind == "port":
            taken = socket.create_server(("127.0.0.1", 0))
            launch._free_port = lambda: taken.getsockname()[1]

    def _before(self, moment: str, owner: Any, name: str) -> None:
        inner = getattr(owner, name)
        # what the system does counts while a checkpoint is written or pruned
        always = owner is not os

        @wraps(inner)
        def outer(*arguments: Any, **named: Any) -> Any:
            if always or self.inside_save:
                self.visit(moment)
            return inner(*arguments, **named)

        setattr(owner, name, outer)

    def _note_saves(self, checkpoint: Any) -> None:
        save, prune = checkpoint.save, checkpoint.prune

        def inside(call: Callable[..., None]) -> Callable[..., None]:
            def run(folder: Path, *arguments: Any) -> None:
                self.inside_save = True
                try:
                    call(folder, *arguments)
                finally:
                    self.inside_save = False
                if call is save:
                    with self.place.saved.open("a") as file:
                        file.write(f"{arguments[0].name}\n")

            return run

        checkpoint.save, checkpoint.prune = inside(save), inside(prune)

    def _note_run(self, kind: Any) -> None:
        begin_step = kind.begin_step

        def begin_and_note(run: Any) -> None:
            self.run = run
            begin_step(run)

        kind.begin_step = begin_and_note

    # -- processes -----------------------------------------------------------------------------------------------

    def pids(self, target: str) -> list[int]:
        """Ids of the processes that a signal is for, this one last."""
        if target == "self":
            return [os.getpid()]
        size = int(os.environ.get("WORLD_SIZE", "1"))
        names = ["launcher"] if target == "launcher" else [f"rank-{number}" for number in range(size)]
        found = []
        for name in names:
            while not (file := self.place.processes / name).exists():
                time.sleep(0.01)
            found.append(int(file.read_text().split()[0]))
        return sorted(found, key=lambda pid: pid == os.getpid())


def happen(watch: _Watch, fault: Fault) -> None:
    if fault.kind in SIGNALS:
        for pid in watch.pids(fault.target):
            os.kill(pid, signal.Signals[fault.kind])
    else:
        globals()[f"_on_{fault.kind}"](watch, fault)


def _on_pause(watch: _Watch, fault: Fault) -> None:
    """Stand still for a while."""
    pids = watch.pids(fault.target)
    listed = " ".join(map(str, pids))
    words = ["sh", "-c", f"sleep {fault.detail / 1000}; kill -CONT {listed}"]
    subprocess.Popen(words, start_new_session=True)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)


def _on_stop(watch: _Watch, _: Fault) -> None:
    """Stand still for ever."""
    os.kill(os.getpid(), signal.SIGSTOP)


def _on_raise(*_: Any) -> None:
    raise ValueError("injected")


def _on_memory(*_: Any) -> None:
    """As torch says it of a CPU."""
    import torch

    torch.empty(2**60, dtype=torch.uint8)


def _on_nan(*_: Any) -> None:
    """From now on every loss of this rank."""
    from gpc_dist.training import trainer

    backward = trainer.backward
    trainer.backward = lambda *arguments: backward(*arguments) * float("nan")


def _on_gradient(_: _Watch, fault: Fault) -> None:
    """A bit of the next step's gradients."""
    from gpc_dist.training import trainer

    backward = trainer.backward

    def backward_and_flip(session: Any, optimizers: Any, step: Any) -> Any:
        losses = backward(session, optimizers, step)
        trainer.backward = backward
        _flip(next(p.grad for p in step.lanes[0].adapter.parameters() if p.grad is not None), fault.detail)
        return losses

    trainer.backward = backward_and_flip


def _on_weight(watch: _Watch, fault: Fault) -> None:
    """A bit of the frozen encoder, in this rank's memory."""
    parameters = list(watch.run.session.model.encoder.parameters())
    parameter = parameters[fault.detail % len(parameters)]
    _flip(getattr(parameter, "ds_tensor", parameter), fault.detail)


def _on_adapter(watch: _Watch, fault: Fault) -> None:
    """A bit of the trained parameters, in this rank's memory."""
    parameters = list(watch.run.adapter.parameters())
    _flip(parameters[fault.detail % len(parameters)], fault.detail)


def _flip(tensor: Any, bit: int) -> None:
    import torch

    octets = tensor.detach().view(-1).view(torch.uint8)
    octets[bit // 8 % len(octets)] ^= 1 << bit % 8


def _on_error(_: _Watch, fault: Fault) -> None:
    """A call of the system fails."""
    raise OSError(fault.detail, os.strerror(fault.detail))


def _on_quota(_: _Watch, fault: Fault) -> None:
    """From now on no file of this rank may have more bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (fault.detail, hard))


def _on_deleted(watch: _Watch, _: Fault) -> None:
    shutil.rmtree(watch.place.run)


def _on_moved(watch: _Watch, _: Fault) -> None:
    watch.place.run.rename(watch.place.moved)
