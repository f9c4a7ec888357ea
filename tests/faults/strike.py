"""Faults in a search: in its driver, in the process of a trial or in a rank of a pack, when it comes to a place.

`launch` runs in the process that is to be the driver. Ray's workers begin from nothing: Python imports the
`sitecustomize` of `tests/holding` in each of them, which calls `watch_workers`. Both read the faults from the folder
that the environment variable names, and patch the functions at which the places are.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import wraps
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from tests.faults import happenings

PLACE = "TESTS_FAULTS"
"""Environment variable: the folder of the case, which all processes of its search have."""


@dataclass(frozen=True)
class Strike:
    """What happens, and at which place. It happens once, whichever process comes there first."""

    kind: str
    """As of `inject.Fault`, or the name of a function `_on_<kind>` here."""
    moment: str
    """See `_watch_driver` and `watch_workers`."""
    trial: int = 0
    """Of whom the moment is; 0 for moments of the search."""
    number: int = 1
    """Which of the moments of the trial: its step, or a count from 1."""
    target: str = "self"
    """Whom a signal is sent: self, driver, packs, gcs_server, raylet, or cluster, which are both of the latter."""
    detail: int = 0

    @property
    def place(self) -> tuple[str, int, int]:
        return self.moment, self.trial, self.number


@dataclass(frozen=True)
class SearchPlace:
    """Folders of a case; `inject` knows the search as `run`."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "searches" / "mine"

    @property
    def moved(self) -> Path:
        return self.folder / "searches" / "moved"

    @property
    def driver(self) -> Path:
        """Holds the ids of the drivers' processes, a line for each start."""
        return self.folder / "driver"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def write(self, strikes: Sequence[Strike]) -> None:
        """Ask for these faults in the search that starts next here."""
        for earlier in self.folder.glob("happened-*"):
            earlier.unlink()
        self._strikes.write_text(json.dumps([asdict(strike) for strike in strikes]))

    def read(self) -> list[Strike]:
        return [Strike(**each) for each in json.loads(self._strikes.read_text())]

    @property
    def _strikes(self) -> Path:
        return self.folder / "strikes.json"

    def claim(self, number: int) -> bool:
        """Whether this process is the first at the place of the fault with this number."""
        try:
            self._happened(number).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def happened(self) -> int:
        """Number of faults that have begun."""
        return len(list(self.folder.glob("happened-*")))

    def _happened(self, number: int) -> Path:
        return self.folder / f"happened-{number}"

    def processes(self) -> Iterator[psutil.Process]:
        """All processes of the search that live; its driver and those that have the environment of the case."""
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                mine = process.environ().get(PLACE) == str(self.folder) or process.cwd() == str(self.folder)
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    yield process

    def drivers(self) -> list[str]:
        """Ids of the processes of all starts."""
        return self.driver.read_text().split() if self.driver.exists() else []


def launch(words: Sequence[str]) -> int:
    """Run `gpc-dist`, and the faults in it."""
    from gpc_dist import cli

    watch = _Watch()
    with watch.place.driver.open("a") as file:
        file.write(f"{os.getpid()}\n")
    _watch_driver(watch)
    return cli.main(words)


class _Watch:
    """Counts what comes to places in this process."""

    def __init__(self) -> None:
        self.place = SearchPlace(Path(os.environ[PLACE]))
        self._strikes = self.place.read()
        self._counts: dict[tuple[str, int], int] = {}

    def visit(self, moment: str, trial: int = 0, number: int | None = None) -> None:
        """This process is at a place.

        Args:
            number: see `Strike`; a count of this process when not given.
        """
        if number is None:
            number = self._counts[moment, trial] = self._counts.get((moment, trial), 0) + 1
        for index, strike in enumerate(self._strikes):
            if strike.place == (moment, trial, number) and self.place.claim(index):
                self._happen(strike)

    def _happen(self, strike: Strike) -> None:
        if own := globals().get(f"_on_{strike.kind}"):
            own(self, strike)
        else:
            happenings.happen(self, strike)  # type: ignore[arg-type]

    def pids(self, target: str) -> list[int]:
        """Ids of the processes that a signal is for."""
        if target == "self":
            return [os.getpid()]
        if target == "driver":
            return [int(self.place.drivers()[-1])]
        found = self._processes(target)
        assert found, f"there is no {target}"
        return found

    def _processes(self, target: str) -> list[int]:
        if target == "packs":
            return [each.pid for each in self.place.processes() if "Packs" in " ".join(each.cmdline())]
        if target == "cluster":
            _, _, port = os.environ["RAY_ADDRESS"].partition(":")
            ray = [
                each
                for each in psutil.process_iter(["name"])
                if each.info["name"] in ("gcs_server", "raylet")
            ]
            return [each.pid for each in ray if port in " ".join(each.cmdline())]
        return [each.pid for each in self.place.processes() if each.name() == target]

    def before(self, owner: Any, name: str, moment: str, trial: Callable[..., Any] = lambda *_: ()) -> None:
        """Patch a function: a call of it is a visit.

        Args:
            trial: returns the trial, and perhaps the number, from the function's arguments.
        """
        inner = getattr(owner, name)

        @wraps(inner)
        def outer(*arguments: Any, **named: Any) -> Any:
            self.visit(moment, *trial(*arguments, **named))
            return inner(*arguments, **named)

        setattr(owner, name, outer)

    def after(self, owner: Any, name: str, moment: str, trial: Callable[..., Any] = lambda *_: ()) -> None:
        """As `before`, when the call has returned: `trial` is called with what it returns first."""
        inner = getattr(owner, name)

        @wraps(inner)
        def outer(*arguments: Any, **named: Any) -> Any:
            found = inner(*arguments, **named)
            self.visit(moment, *trial(found, *arguments, **named))
            return found

        setattr(owner, name, outer)


def _watch_driver(watch: _Watch) -> None:
    """`start` and `end` of the search, its `write`s, and what it does of a trial: it has `heard` a result, and it is
    to `note` what it has decided, or has `noted` it."""
    import ray

    from gpc_dist import files
    from gpc_dist.search import algorithm, callback, ray_cluster, ray_tune, tuner

    for owner, name in (
        (tuner, "_open"),
        (ray_tune, "place_for_ray"),
        (ray_cluster, "_own"),
        (ray_cluster, "_wait_for_nodes"),
        (ray_tune, "pack_shape"),
        (algorithm, "param_space"),
        (algorithm, "searcher"),
    ):
        watch.before(owner, name, "start")
    for owner, name in ((ray, "kill"), (ray, "shutdown"), (tuner, "_close"), (tuner, "best_trial")):
        watch.before(owner, name, "end")
    watch.before(files, "write_text", "write")
    notes = callback.TrialCallback

    def heard(*_: Any, trial: Any, result: dict[str, Any], **__: Any) -> tuple[int, int]:
        return int(str(trial)), result["step"]

    watch.before(notes, "on_trial_result", "heard", heard)
    watch.before(notes, "_note", "note", lambda _, trial, **__: (int(str(trial)),))
    watch.after(notes, "_note", "noted", lambda _, __, trial, **___: (int(str(trial)),))


def watch_workers() -> None:
    """Of a trial's process: it is about to `join` a pack or to `leave` it, it has a result to `report`, it makes a
    `copy` of the state. Of a rank: it is to `open` its pack, to `add` a run, to make a `step` or to note an
    `evaluation` of it, to `save` it, to `sync` a file while it saves, has `saved` it, or is to `close` it."""
    watch = _Watch()

    def patch_trial(module: ModuleType) -> None:
        trial = module.Trial
        watch.before(trial, "_join", "join", lambda self: (self._number,))
        watch.before(trial, "cleanup", "leave", lambda self: (self._number,))
        watch.before(trial, "save_checkpoint", "copy", lambda self, _: (self._number,))
        watch.after(trial, "step", "report", lambda found, self: (self._number, found["step"]))

    def patch_rank(module: ModuleType) -> None:
        watch.before(module.Rank, "open", "open")
        watch.before(module.Rank, "add", "add", lambda _, name, *__: (int(name),))

    def patch_run(module: ModuleType) -> None:
        run = module.Run
        watch.before(run, "begin_step", "step", lambda self: (_number(self), self.position.step + 1))
        watch.before(run, "finish_evaluation", "evaluation", lambda self, _: _step(self))
        watch.before(run, "save", "save", _step)
        _watch_syncs(watch, run)
        watch.after(run, "save", "saved", lambda _, self: _step(self))

    def patch_pack(module: ModuleType) -> None:
        watch.before(module.Pack, "_close", "close", lambda _, name, *__: (int(name),))

    when_imported("gpc_dist.search.trial", patch_trial)
    when_imported("gpc_dist.search.ranks", patch_rank)
    when_imported("gpc_dist.training.run", patch_run)
    when_imported("gpc_dist.training.pack", patch_pack)


def _watch_syncs(watch: _Watch, run: Any) -> None:
    save, sync = run.save, os.fsync
    saving: list[Any] = []

    def save_and_note(self: Any) -> None:
        saving.append(self)
        try:
            save(self)
        finally:
            saving.pop()

    def sync_and_visit(handle: int) -> None:
        if saving:
            watch.visit("sync", _number(saving[-1]))
        sync(handle)

    run.save, os.fsync = save_and_note, sync_and_visit


def _number(run: Any) -> int:
    return int(run.folder.path.name)


def _step(run: Any) -> tuple[int, int]:
    return _number(run), run.position.step


def when_imported(name: str, patch: Callable[[ModuleType], None]) -> None:
    """Patch a module once it is imported: it may not be now, because what its imports read is not set yet."""
    sys.meta_path.insert(0, _Patching(name, patch))


class _Patching(MetaPathFinder):
    def __init__(self, name: str, patch: Callable[[ModuleType], None]):
        self._name, self._patch = name, patch

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            self._patch(module)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


def _on_lane(_: _Watch, strike: Strike) -> None:
    """From now on the adapter of this trial is NaN in every step, and no other in its pack."""
    from gpc_dist.training.run import Run

    begin_step = Run.begin_step

    def spoil_and_begin(run: Any) -> None:
        if _number(run) == strike.trial:
            next(run.adapter.parameters()).data.fill_(float("nan"))
        begin_step(run)

    Run.begin_step = spoil_and_begin  # type: ignore[method-assign]
