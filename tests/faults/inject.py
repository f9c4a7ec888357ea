"""A fault in a run: in the rank where it is to happen, when that rank comes to some place for the n-th time.

`launch` runs in the process that is to be the command. Its ranks are forks of it (`tests.processes`), and so have what
it has patched: each notes its process, so that others can send it signals and the campaign can see whether it is left.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import psutil

from tests.faults.disk import Disk
from tests.faults.happenings import happen

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


@dataclass(frozen=True)
class Fault:
    """What happens, where and when."""

    kind: str
    """A signal, or the name of a function in `happenings`."""
    moment: str
    """Of the run, see `Watch.patch`."""
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

    watch = Watch(Place(place), None if faults is None else [Fault(**fault) for fault in faults])
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
    watch, main = Watch(place, [] if place.happened(fault).exists() else [fault]), cli.main

    def note_and_run(words: Sequence[str] | None = None) -> int:
        number = os.environ["SLURM_PROCID"]
        watch.note(f"{number}-{os.getpid()}")
        if number == "0" and (lost := place.lost()):
            place.losses.write_text(lost)
        watch.patch()
        return main(words)

    cli.main = note_and_run


class Watch:
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
            "end": [(run.Run, "close"), (train, "run_result"), (train._Record, "end")],
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
