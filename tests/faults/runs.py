"""Faults in single runs: what is drawn, and what must hold after it and after the run has gone on."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from gpc_dist.distributed import checkpoint
from gpc_dist.errors import EXIT_DONE, EXIT_ENVIRONMENT, EXIT_USAGE
from tests.faults.case import Outcome, end, left, noted, shared_memory, tiny_inputs
from tests.faults.inject import Fault, Place, launch
from tests.faults.run_kinds import KINDS, NOT_DETECTED, PAIRED, TIMEOUT_S, Kind, RunCase
from tests.processes import Started, free_port, start_call

_LIMIT_S = TIMEOUT_S + 25 + 60
"""Longest wait for a command: the timeout, what the launcher gives its ranks to end, and a slow start."""
_SAME = ("train/loss", "train/grad_norm", "train/lr_factor", "train/epoch")


_ON_A_SMALL_DISK = ("full", "readonly")


def _may_mount() -> bool:
    """Whether this process can make a case a disk of its own."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "CapEff" in line)
    return bool(int(line.split()[1], 16) >> 21 & 1)  # CAP_SYS_ADMIN


class Runs:
    """The family of faults in single runs; see `Family`."""

    table: Mapping[str, Kind] = KINDS
    kinds = tuple(kind for kind in (*KINDS, "pair") if _may_mount() or kind not in _ON_A_SMALL_DISK)
    at_once = 2

    def __init__(self, folder: Path):
        self.folder = folder
        self.recipe = tiny_inputs(folder / "inputs")
        self.undisturbed = cache(self._undisturbed)

    def draw(self, kind: str, seed: int) -> RunCase:
        chance = random.Random(f"{kind} {seed}")
        names = [kind] if kind != "pair" else chance.sample(PAIRED, 2)
        ranks, stage = chance.choice(self.table[names[0]].arrangements)
        faults, at = [], []
        for number, name in enumerate(names):
            how = self.table[name]
            moment = chance.choice([m for m in how.moments if ranks > 1 or m != "collective"])
            rank = how.rank if how.rank is not None else chance.randrange(ranks)
            target, detail = chance.choice(how.targets), how.detail(chance)
            faults.append((name, Fault(how.injected or name, moment, 0, rank, target, detail, number)))
            at.append(chance.uniform(*how.span))
        return RunCase(kind, seed, ranks, stage, tuple(faults), tuple(at))

    def prepare(self, cases: Iterable[RunCase]) -> None:
        for ranks, stage in sorted({(case.ranks, case.stage) for case in cases}):
            self.undisturbed(ranks, stage)

    def close(self) -> None:
        pass

    def _undisturbed(self, ranks: int, stage: int) -> dict[str, Any]:
        """What a run without a fault leaves."""
        place = Place(self.folder / f"undisturbed-{ranks}-{stage}")
        if not (place.run / "result.json").exists():
            self.open(place)
            started = self._start(place, None, ranks, stage, None)
            assert end(started, _LIMIT_S) == EXIT_DONE, started.stderr
            assert not (found := self.finished(None, place)), found
        return results(place.run)

    def run(self, case: RunCase) -> Outcome:
        """Run a case; its folder stays if something did not hold."""
        reference = self.undisturbed(case.ranks, case.stage)
        began_s = time.monotonic()
        place = Place(self.folder / case.name)
        self.open(place)
        rest = self._faults(case)
        where = ", ".join(
            f"{name} at {f.moment} {f.visit} of rank {f.rank}: {f.target} {f.detail}" for name, f in rest
        )
        outcome = Outcome(case.kind, case.seed, f"{case.ranks} ranks, stage {case.stage}, {where}")
        before = shared_memory()
        with _disk(place, case):
            undetected = self._attempts(case, place, rest, outcome)
            if not outcome.problems:
                outcome.problems += self.finished(case, place)
            outcome.injected = sum(place.happened(fault).exists() for _, fault in rest)
            if not outcome.problems and not undetected:
                outcome.problems += differences(place.run, reference)
                outcome.same = not outcome.problems
            if not outcome.problems:
                outcome.problems += rubbish(place, before)
        outcome.seconds = round(time.monotonic() - began_s, 1)
        if not outcome.problems:
            shutil.rmtree(place.folder)
        return outcome

    def _attempts(self, case: RunCase, place: Place, rest: list[tuple[str, Fault]], outcome: Outcome) -> bool:
        """Give the command until it is done, with those of the faults that have not happened yet. Returns whether one
        happened after which the result is another."""
        undetected = False
        for attempt in range(len(rest) + 1):
            started = self._begin(case, place, rest)
            outcome.problems += self.meanwhile(case, place, started, rest)
            code = end(started, _LIMIT_S)
            said = next(reversed(started.stderr.strip().splitlines()), "")
            if attempt == 0:
                outcome.code, outcome.said = code, said
            now = [name for name, fault in rest if place.happened(fault).exists()]
            rest = [(name, fault) for name, fault in rest if name not in now]
            undetected |= any(name in NOT_DETECTED for name in now)
            outcome.problems += self._check_end(now, code, started.stderr)
            outcome.problems += [*_check_saved(case, place), *_left(place)]
            if outcome.problems:
                (place.folder / "stderr").write_text(started.stderr)
            if code == EXIT_DONE or outcome.problems:
                return undetected
            outcome.problems += self._mended(case, place)
        return undetected

    def _faults(self, case: RunCase) -> list[tuple[str, Fault]]:
        """The faults of a case, at visits that a run makes."""
        return [
            (name, self.at_visit(fault, at, case.ranks, case.stage))
            for (name, fault), at in zip(case.faults, case.at, strict=True)
        ]

    def at_visit(self, fault: Fault, at: float, ranks: int, stage: int) -> Fault:
        """The fault at one of the visits of its moment, from 0 for the first to 1; never where there is none."""
        file = Place(self.folder / f"undisturbed-{ranks}-{stage}").visits / f"{fault.moment}-{fault.rank}"
        count = file.stat().st_size if file.exists() else 0
        return replace(fault, visit=1 + min(int(at * count), count - 1))

    def _begin(self, case: RunCase, place: Place, faults: list[tuple[str, Fault]]) -> Started:
        absent = [fault for name, fault in faults if name == "absent"]
        rank = str(absent[0].rank) if absent else None
        if absent:
            place.happened(absent[0]).touch()
        return self._start(place, case, case.ranks, case.stage, [fault for _, fault in faults], rank)

    def _start(
        self,
        place: Place,
        case: RunCase | None,
        ranks: int,
        stage: int,
        faults: list[Fault] | None,
        alone: str | None = None,
        run: Path | None = None,
    ) -> Started:
        """Start the command.

        Args:
            faults: None notes how often places are visited.
            alone: the rank that it is to be where no launcher starts the others.
            run: the run's folder, if it is that of another place.
        """
        words = ["train", str(self.recipe), "--run.dir", str(run or place.run), "--train.keep_last", "1"]
        kinds = [self.table[name] for name, _ in case.faults] if case and faults else []
        timeout_s = min((kind.timeout_s for kind in kinds), default=TIMEOUT_S)
        words += ["--engine.zero_stage", str(stage), "--engine.timeout_s", str(timeout_s)]
        words += self.settings(case)
        environment = {"TMPDIR": str(place.folder / "tmp"), "OMP_NUM_THREADS": "1"}
        if alone is not None:
            environment |= {"RANK": alone, "LOCAL_RANK": alone, "WORLD_SIZE": str(ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        elif ranks > 1:
            words += ["--engine.ranks", str(ranks)]
        (place.folder / "tmp").mkdir(parents=True, exist_ok=True)
        given = None if faults is None else [asdict(fault) for fault in faults]
        return start_call(launch, words, place.folder, given, **environment)

    def open(self, place: Place) -> None:
        """Make the folders of a case, or of an undisturbed run."""
        shutil.rmtree(place.folder, ignore_errors=True)
        place.disk.mkdir(parents=True)

    def settings(self, case: RunCase | None) -> list[str]:
        """More words of the command, of a case or of an undisturbed run."""
        return []

    def meanwhile(
        self, case: RunCase, place: Place, started: Started, faults: list[tuple[str, Fault]]
    ) -> list[str]:
        """Do what is to happen beside the command. Returns what did not hold then."""
        held = [fault for name, fault in faults if name == "twice"]
        if not held:
            return []
        while not place.happened(held[0]).exists() and started.returncode is None:
            time.sleep(0.02)
        beside = Place(place.folder / "second")
        second = self._start(beside, case, case.ranks, case.stage, [], run=place.run)
        code = end(second, _LIMIT_S)
        place.released.touch()
        if code != EXIT_ENVIRONMENT or "Traceback" in second.stderr:
            return [f"a second command was not refused: {code}, {second.stderr[-500:]}"]
        return []

    def finished(self, case: RunCase | None, place: Place) -> list[str]:
        """Look at a run that is done. Returns what does not hold."""
        return []

    def _mended(self, case: RunCase, place: Place) -> list[str]:
        """Do what the messages of a run say, before the command is given again."""
        if case.kind == "readonly":
            _unmount(place.disk)
        place.filler.unlink(missing_ok=True)
        if case.kind == "deleted":  # what was written of a save that had begun
            shutil.rmtree(place.run, ignore_errors=True)
        if place.moved.exists():
            shutil.rmtree(place.run, ignore_errors=True)
            place.moved.rename(place.run)
        damaged = _damage(case, place)
        if damaged is None:
            return []
        started = self._start(place, case, case.ranks, case.stage, [])
        code = end(started, _LIMIT_S)
        if code != EXIT_USAGE or f"{damaged} is damaged" not in started.stderr:
            return [f"a damaged checkpoint was not refused: {code}, {started.stderr[-500:]}"]
        shutil.rmtree(damaged)
        return _left(place)

    def _check_end(self, happened: list[str], code: int | None, said: str) -> list[str]:
        """Whether a command ended as is right after faults of these kinds."""
        last = next(reversed(said.strip().splitlines()), "")
        if code is None:
            return [f"it hung for {_LIMIT_S} s"]
        if code == EXIT_DONE:
            hidden = [
                kind for kind in happened if kind in ("weight", "adapter", "nan", "stop", "port", "absent")
            ]
            return [f"{kind} was not detected" for kind in hidden]
        right: set[int] = set().union(*(self.table[kind].codes for kind in happened))
        if code not in right:
            return [f"exit code {code} instead of {sorted(right | {EXIT_DONE})}: {last}"]
        if "Traceback" in said and "raise" not in happened:
            return [f"a trace: {last}"]
        missing = [says for kind in happened if not re.search(says := self.table[kind].says, said)]
        # of two faults, one may end the run before the other is noticed
        return [f"it did not say '{words}': {last}" for words in missing] if len(happened) == 1 else []


@contextmanager
def _disk(place: Place, case: RunCase) -> Iterator[None]:
    """What a case writes to: a small disk if it is to become full, or not to be written to."""
    if case.kind not in _ON_A_SMALL_DISK:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place.disk)], check=True)
    try:
        yield
    finally:
        while os.path.ismount(place.disk):
            _unmount(place.disk)


def _unmount(folder: Path) -> None:
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


def is_same(metric: str) -> bool:
    """Whether a metric does not depend on the clock."""
    return metric in _SAME or metric.startswith("val/")


def results(run: Path) -> dict[str, Any]:
    """What must be equal in two runs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key == "step" or is_same(key)} for line in lines]
    if (last := checkpoint.newest(run / "checkpoints")) is None:
        raise ValueError("no checkpoint")
    result = json.loads((run / "result.json").read_text())
    return {
        "metrics": metrics,
        "adapter": (run / "adapter" / "adapter.safetensors").read_bytes(),
        "state": (last / "trained.safetensors").read_bytes(),
        "generators": (last / "rng.safetensors").read_bytes(),
        "result": {key: result[key] for key in ("metrics", "steps", "world_size", "zero_stage")},
        "files": sorted(path.name for path in run.iterdir() if path.name != "logs"),
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
    }


def _check_saved(case: RunCase, place: Place) -> list[str]:
    """The newest checkpoint that was reported as saved is there."""
    if not place.saved.exists() or case.kind == "deleted":
        return []
    reported = place.saved.read_text().splitlines()[-1]
    run = place.moved if place.moved.exists() else place.run
    newest = checkpoint.newest(run / "checkpoints")
    if newest is None or newest.name < reported:
        return [f"{reported} was reported as saved, and the newest is {newest}"]
    return []


def _left(place: Place) -> list[str]:
    return left(lambda: noted(place.processes))


def rubbish(place: Place, before: set[str]) -> list[str]:
    """Temporary files and shared memory that are left when the run is done."""
    found = [f"{name} is left in the temporary folder" for name in os.listdir(place.folder / "tmp")]
    pids = {file.read_text().split()[0] for file in place.processes.glob("[!.]*")}
    for name in shared_memory() - before:
        if pids & set(re.findall(r"\d+", name)):
            found.append(f"/dev/shm/{name} is left")
    return found


def differences(run: Path, theirs: dict[str, Any]) -> list[str]:
    """What to say of a run that should have the same results as another one."""
    try:
        mine = results(run)
    except (OSError, ValueError, KeyError) as error:
        return [f"there are no whole results: {error}"]
    found = [f"{key} differs" for key in theirs if key != "metrics" and mine[key] != theirs[key]]
    for key in ("files", "checkpoints"):
        if mine[key] != theirs[key]:
            found.append(f"{key}: {mine[key]} instead of {theirs[key]}")
    if mine["metrics"] != theirs["metrics"]:
        steps = [line["step"] for line in mine["metrics"]]
        found.append(f"the metrics differ, of steps {steps}")
    return found


def _damage(case: RunCase, place: Place) -> Path | None:
    """Damage what a killed run has left. Returns the checkpoint that can no longer be used, if one is damaged."""
    detail = case.faults[0][1].detail
    if case.kind == "torn":
        with (place.run / "metrics.jsonl").open("ab") as file:
            file.write([b'{"step": 11, "tra', b"\0" * 512, b"\xff\n"][detail % 3])
    newest = checkpoint.newest(place.run / "checkpoints")
    if case.kind not in ("bit", "cut") or newest is None:
        return None
    files = sorted(path for path in newest.iterdir() if path.name != "COMPLETE")
    file = files[detail % len(files)]
    content = bytearray(file.read_bytes())
    if case.kind == "cut":
        del content[detail % len(content) :]
    else:
        content[detail // 8 % len(content)] ^= 1 << detail % 8
    file.write_bytes(content)
    return newest
