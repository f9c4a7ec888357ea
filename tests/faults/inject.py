"""A fault in a run: in the rank where it is to happen, when that rank comes to some place for the n-th time.

`launch` runs in the process that is to be the command. Its ranks are forks of it (`tests.processes`), and so have what
it has patched: each notes its process, so that others can send it signals and the campaign can see whether it is left.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import psutil

from tests.faults.disk import Disk

_COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "gather",
    "barrier",
)
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
    """Of the kind: an error number, bytes, a bit, milliseconds, seconds."""
    number: int = 0
    """Of those of a case."""


@dataclass(frozen=True)
class Place:
    """Folders of a case."""

    folder: Path

    @property
    def disk(self) -> Path:
        """Holds what the command writes."""
        return self.folder / "disk"

    @property
    def run(self) -> Path:
        return self.disk / "run"

    @property
    def moved(self) -> Path:
        return self.disk / "moved"

    @property
    def filler(self) -> Path:
        """A file that fills the disk."""
        return self.disk / "filler"

    @property
    def processes(self) -> Path:
        """Holds a file for each process, with its id and the time at which it began."""
        return self.folder / "processes"

    @property
    def exporters(self) -> Path:
        """Holds such a file for each exporter to MLflow."""
        return self.folder / "exporters"

    @property
    def saved(self) -> Path:
        """Names of the checkpoints whose saves have returned."""
        return self.folder / "saved"

    @property
    def visits(self) -> Path:
        """Holds a file for each moment and rank of a run without a fault, as long as it has visits."""
        return self.folder / "visits"

    def happened(self, fault: Fault) -> Path:
        """There once the fault has begun."""
        return self.folder / f"happened-{fault.number}"

    @property
    def released(self) -> Path:
        """A rank that is held goes on once it is there."""
        return self.folder / "released"

    @property
    def fault(self) -> Path:
        """The fault in a run whose ranks others start, see `join`."""
        return self.folder / "fault.json"

    @property
    def losses(self) -> Path:
        """What starts of such a run have found lost."""
        return self.folder / "losses"

    def lost(self) -> str:
        """What to say of the newest checkpoint that was reported as saved, if neither it nor a newer one is there."""
        from gpc_dist.distributed import checkpoint

        reported = self.saved.read_text().splitlines()[-1] if self.saved.exists() else ""
        newest = checkpoint.newest(self.run / "checkpoints")
        if reported and (newest is None or newest.name < reported):
            return f"{reported} was reported as saved, and the newest is {newest}"
        return ""


def launch(words: Sequence[str], place: Path, faults: Sequence[dict[str, Any]] | None) -> int:
    """Run `gpc-dist`, and the faults in it; without a list of them, what is noted is how often places are visited."""
    from gpc_dist import cli
    from tests import processes

    watch = _Watch(Place(place), None if faults is None else [Fault(**fault) for fault in faults])
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


def join() -> None:
    """In a rank that others start: let the fault happen that is described in the folder TESTS_JOB, or in the folder
    there of this task of a job array. It happens once, however often the rank is started."""
    from gpc_dist import cli

    place = Place(Path(os.environ["TESTS_JOB"], os.environ.get("SLURM_ARRAY_TASK_ID", "")))
    fault = Fault(**json.loads(place.fault.read_text()))
    watch, main = _Watch(place, [] if place.happened(fault).exists() else [fault]), cli.main

    def note_and_run(words: Sequence[str] | None = None) -> int:
        number = os.environ["SLURM_PROCID"]
        watch.note(f"{number}-{os.getpid()}")
        if number == "0" and (lost := place.lost()):
            place.losses.write_text(lost)
        watch.patch()
        return main(words)

    cli.main = note_and_run


class _Watch:
    """Counts the visits of each moment, in each rank by itself."""

    def __init__(self, place: Place, faults: Sequence[Fault] | None):
        self.place, self.faults = place, faults
        self.visits: Counter[str] = Counter()
        self.disk = Disk(place.disk, place.folder / "replaced")
        self.run: Any = None
        """The `Run`, once it makes steps."""
        self.inside_save = False
        self.exporter: int | None = None
        """Process id of the exporter that this rank has started."""

    def note(self, name: str) -> None:
        note(self.place.processes, name, os.getpid())

    def visit(self, moment: str) -> None:
        rank = int(os.environ.get("RANK", "0"))
        if self.faults is None:
            self.place.visits.mkdir(exist_ok=True)
            with (self.place.visits / f"{moment}-{rank}").open("ab") as file:
                file.write(b".")
            return
        self.visits[moment] += 1
        for fault in self.faults:
            if (fault.moment, fault.visit, fault.rank) == (moment, self.visits[moment], rank):
                self.place.happened(fault).touch()
                happen(self, fault)

    def patch(self) -> None:
        from torch import distributed

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
            "collective": [(distributed, name) for name in _COLLECTIVES],
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
        self._note_exporters()
        self._note_run(run.Run)
        kinds = {fault.kind: fault for fault in self.faults or ()}
        if "power" in kinds:
            self.disk.watch()
        if "port" in kinds:
            self.place.happened(kinds["port"]).touch()
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
                # what went into a folder that was moved is not reported: the run ends, and says so
                if call is save and (self.run is None or self.run.folder.present):
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

    def _note_exporters(self) -> None:
        from gpc_dist.tracking import process

        spawn = process.spawn

        def spawn_and_note(*arguments: Any) -> Any:
            exporter = spawn(*arguments)
            assert exporter is not None
            note(self.place.exporters, str(exporter.pid), exporter.pid)
            self.exporter = exporter.pid
            self.visit("export")
            return exporter

        process.spawn = spawn_and_note

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


def note(folder: Path, name: str, pid: int) -> None:
    """Write which process this is; see `case.noted`."""
    folder.mkdir(exist_ok=True)
    temporary = folder / f".{name}"
    temporary.write_text(f"{pid} {psutil.Process(pid).create_time()}")
    temporary.rename(folder / name)


def happen(watch: _Watch, fault: Fault) -> None:
    if fault.kind in SIGNALS:
        for pid in watch.pids(fault.target):
            os.kill(pid, signal.Signals[fault.kind])
    else:
        globals()[f"_on_{fault.kind}"](watch, fault)


def _on_pause(watch: _Watch, fault: Fault) -> None:
    """Stand still for a while."""
    pids = watch.pids(fault.target)
    _later(fault.detail, "CONT", pids)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)


def _later(after_ms: int, name: str, pids: Sequence[int]) -> None:
    """Send a signal from a process of its own: this one may stand still then, or be gone."""
    words = ["sh", "-c", f"sleep {after_ms / 1000}; kill -{name} {' '.join(map(str, pids))}"]
    subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL)


def _on_exporter_kill(watch: _Watch, fault: Fault) -> None:
    """The exporter is killed after some time."""
    assert watch.exporter is not None
    _later(fault.detail, "KILL", [watch.exporter])


def _on_exporter_end(watch: _Watch, fault: Fault) -> None:
    """The exporter is asked to end after some time, as a batch system asks all processes of a job."""
    assert watch.exporter is not None
    _later(fault.detail, "TERM", [watch.exporter])


def _on_exporter_pause(watch: _Watch, fault: Fault) -> None:
    """The exporter stands still for some seconds, after some time."""
    assert watch.exporter is not None
    _later(fault.detail, "STOP", [watch.exporter])
    _later(fault.detail + 4000, "CONT", [watch.exporter])


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


def _on_clock(_: _Watch, fault: Fault) -> None:
    """The clock of this rank jumps, back or forth."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + fault.detail
    time.time_ns = lambda: now_ns() + fault.detail * 10**9


def _on_power(watch: _Watch, _: Fault) -> None:
    """The machine loses its power, and what its disk has not promised to keep."""
    me = os.getpid()
    for pid in [*watch.pids("launcher"), *(pid for pid in watch.pids("ranks") if pid != me)]:
        if pid != me:
            os.kill(pid, signal.SIGKILL)
    watch.disk.cut()
    os.kill(me, signal.SIGKILL)


def _on_full(watch: _Watch, fault: Fault) -> None:
    """Nobody may write more than these bytes: a file of somebody else has the rest of the disk."""
    room = os.statvfs(watch.place.disk)
    left = room.f_bavail * room.f_frsize - fault.detail
    with watch.place.filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, left))


def _on_readonly(watch: _Watch, _: Fault) -> None:
    """The disk is mounted again, without the right to write: only files that are open may be written on."""
    disk = str(watch.place.disk)
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", disk], check=True)


def _on_hold(watch: _Watch, _: Fault) -> None:
    """Stand still until the campaign has tried something."""
    while not watch.place.released.exists():
        time.sleep(0.01)
