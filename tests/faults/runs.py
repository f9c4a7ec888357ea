"""Faults in single runs: what is drawn, and what must hold after it and after the run has gone on."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from gpc_dist.distributed import checkpoint
from gpc_dist.errors import EXIT_DONE, EXIT_ENVIRONMENT, EXIT_STOPPED, EXIT_USAGE
from tests.faults.case import Case, Outcome, end, left, noted, shared_memory, tiny_inputs
from tests.faults.inject import Fault, Place, launch
from tests.processes import Started, start_call

TIMEOUT_S = 20
"""`engine.timeout_s` of all runs."""
_LIMIT_S = TIMEOUT_S + 25 + 60
"""Longest wait for a command: the timeout, what the launcher gives its ranks to end, and a slow start."""
_SAME = ("train/loss", "train/grad_norm", "train/lr_factor", "train/epoch")
"""Of a step, what does not depend on the clock; with all of `val/`."""
EVERYWHERE = ("start", "step", "evaluation", "save", "prune", "end")


@dataclass(frozen=True)
class RunCase(Case):
    ranks: int
    stage: int
    fault: Fault
    """Its visit is still open."""
    at: float
    """Which of the visits it is, from 0 for the first to 1."""


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    moments: tuple[str, ...]
    codes: frozenset[int]
    """Exit codes that are right, apart from 0 of a run that the fault did not reach or harm."""
    says: str = ""
    """What the error must say, if there is one."""
    arrangements: tuple[tuple[int, int], ...] = ((1, 0), (2, 0), (2, 1), (2, 3))
    """Ranks and ZeRO stage."""
    targets: tuple[str, ...] = ("self",)
    detail: Callable[[random.Random], int] = lambda _: 0
    rank: int | None = None
    """The only rank in which it happens."""
    span: tuple[float, float] = (0, 1)
    """Of the visits of its moment, those at which it happens."""
    injected: str = ""
    """Name of what happens, if it is not that of the kind."""


_WHOM = ("self", "launcher", "ranks")


def _signal(name: str, *codes: int) -> Kind:
    number = signal.Signals[name]
    return Kind(EVERYWHERE, frozenset({128 + number, -number, *codes}), targets=_WHOM)


def _errno(draw: random.Random) -> int:
    return draw.choice([errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])


def _bit(draw: random.Random) -> int:
    return draw.randrange(2**16)


_MACHINE = frozenset({EXIT_ENVIRONMENT})
_SHARED = ((2, 0), (2, 1), (2, 3))

# once there is a checkpoint
_KILLED = Kind(("step",), frozenset({-9, 128 + 9}), rank=0, injected="SIGKILL", detail=_bit, span=(0.4, 1))

KINDS: dict[str, Kind] = {
    "SIGKILL": _signal("SIGKILL"),
    "SIGTERM": _signal("SIGTERM", EXIT_STOPPED),
    "SIGINT": _signal("SIGINT", EXIT_STOPPED),
    "SIGUSR2": _signal("SIGUSR2", EXIT_STOPPED),
    "pause": Kind(EVERYWHERE, frozenset(), targets=_WHOM, detail=lambda draw: draw.randrange(50, 1500)),
    "stop": Kind(("start", "step", "evaluation", "save"), _MACHINE, "did not", arrangements=_SHARED),
    # the other rank is lost, and may be found first
    "raise": Kind(EVERYWHERE, frozenset({1, EXIT_ENVIRONMENT})),
    "memory": Kind(EVERYWHERE, _MACHINE, "memory"),
    # all of its steps are before a save, or those left out would be saved
    "nan": Kind(("step",), frozenset({EXIT_USAGE}), "not finite", span=(0, 0.05)),
    "gradient": Kind(("step",), frozenset(), detail=_bit),
    "weight": Kind(("step",), _MACHINE, "changed in the memory of rank", detail=_bit),
    "adapter": Kind(("step",), _MACHINE, "the adapter differs", arrangements=((2, 0),), detail=_bit),
    "error": Kind(("save", "prune"), _MACHINE, detail=_errno, rank=0),
    "quota": Kind(EVERYWHERE, _MACHINE, detail=lambda draw: int(2 ** draw.uniform(12, 17)), rank=0),
    "deleted": Kind(("step", "evaluation", "save"), _MACHINE, rank=0),
    "moved": Kind(("step", "evaluation", "save"), _MACHINE, rank=0),
    "port": Kind(("never",), _MACHINE, "could not join", arrangements=_SHARED),
    "bit": _KILLED,
    "cut": _KILLED,
    "torn": _KILLED,
}
"""By name. `bit`, `cut` and `torn` damage the newest checkpoint or the metrics after the run was killed."""

NOT_DETECTED = ("gradient",)
"""Kinds after which a run goes on to another result, as the documentation says."""


class Runs:
    """The family of faults in single runs; see `Family`."""

    kinds = tuple(KINDS)
    at_once = 2

    def __init__(self, folder: Path):
        self.folder = folder
        self._recipe = tiny_inputs(folder / "inputs")
        self.undisturbed = cache(self._undisturbed)

    def draw(self, kind: str, seed: int) -> RunCase:
        chance, how = random.Random(f"{kind} {seed}"), KINDS[kind]
        ranks, stage = chance.choice(how.arrangements)
        moment = chance.choice(how.moments)
        rank = how.rank if how.rank is not None else chance.randrange(ranks)
        fault = Fault(how.injected or kind, moment, 0, rank, chance.choice(how.targets), how.detail(chance))
        return RunCase(kind, seed, ranks, stage, fault, chance.uniform(*how.span))

    def prepare(self, cases: Iterable[RunCase]) -> None:
        for ranks, stage in sorted({(case.ranks, case.stage) for case in cases}):
            self.undisturbed(ranks, stage)

    def close(self) -> None:
        pass

    def _undisturbed(self, ranks: int, stage: int) -> dict[str, Any]:
        """What a run without a fault leaves."""
        place = Place(self.folder / f"undisturbed-{ranks}-{stage}")
        if not (place.run / "result.json").exists():
            shutil.rmtree(place.folder, ignore_errors=True)
            place.folder.mkdir(parents=True)
            started = self._start(place, ranks, stage, None)
            assert end(started, _LIMIT_S) == EXIT_DONE, started.stderr
        return results(place.run)

    def run(self, case: RunCase) -> Outcome:
        """Run a case; its folder stays if something did not hold."""
        reference = self.undisturbed(case.ranks, case.stage)
        began_s = time.monotonic()
        place = Place(self.folder / case.name)
        shutil.rmtree(place.folder, ignore_errors=True)
        place.folder.mkdir(parents=True)
        fault = self._fault(case)
        where = f"{fault.moment} {fault.visit} of rank {fault.rank} of {case.ranks}, stage {case.stage}"
        outcome = Outcome(case.kind, case.seed, f"{where}: {fault.target} {fault.detail}")
        before = shared_memory()
        started = self._start(place, case.ranks, case.stage, fault)
        outcome.code = end(started, _LIMIT_S)
        outcome.injected = int(place.happened.exists() or case.kind == "port")
        outcome.said = next(reversed(started.stderr.strip().splitlines()), "")
        for check in (_check_end, _check_saved):
            outcome.problems += check(case, outcome, place, started.stderr)
        outcome.problems += _left(place)
        if outcome.code != EXIT_DONE and not outcome.problems:
            outcome.problems += self._go_on(case, place)
        if not outcome.problems and not (case.kind in NOT_DETECTED and outcome.injected):
            try:
                found = _differences(results(place.run), reference)
                outcome.same, outcome.problems = not found, outcome.problems + found
            except (OSError, ValueError, KeyError) as error:
                outcome.problems.append(f"there are no whole results: {error}")
            outcome.problems += _rubbish(place, before)
        outcome.seconds = round(time.monotonic() - began_s, 1)
        if not outcome.problems:
            shutil.rmtree(place.folder)
        else:
            (place.folder / "stderr").write_text(started.stderr)
        return outcome

    def _fault(self, case: RunCase) -> Fault:
        """The fault of a case, at a visit that a run makes."""
        place = Place(self.folder / f"undisturbed-{case.ranks}-{case.stage}")
        file = place.visits / f"{case.fault.moment}-{case.fault.rank}"
        count = file.stat().st_size if file.exists() else 0
        return replace(case.fault, visit=1 + min(int(case.at * count), count - 1))

    def _start(self, place: Place, ranks: int, stage: int, fault: Fault | None) -> Started:
        words = ["train", str(self._recipe), "--run.dir", str(place.run), "--engine.zero_stage", str(stage)]
        words += ["--engine.timeout_s", str(TIMEOUT_S), "--train.keep_last", "1"]
        if ranks > 1:
            words += ["--engine.ranks", str(ranks)]
        temporary = place.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        given = asdict(fault) if fault else None
        return start_call(launch, words, place.folder, given, TMPDIR=str(temporary), OMP_NUM_THREADS="1")

    def _go_on(self, case: RunCase, place: Place) -> list[str]:
        """Give the same command again, after what its messages say is to be done."""
        if case.kind == "deleted":  # what was written of a save that had begun
            shutil.rmtree(place.run, ignore_errors=True)
        if place.moved.exists():
            shutil.rmtree(place.run, ignore_errors=True)
            place.moved.rename(place.run)
        damaged = _damage(case, place)
        started = self._start(place, case.ranks, case.stage, None)
        code = end(started, _LIMIT_S)
        if damaged is not None:
            if code != EXIT_USAGE or f"{damaged} is damaged" not in started.stderr:
                return [f"a damaged checkpoint was not refused: {code}, {started.stderr[-500:]}"]
            shutil.rmtree(damaged)
            started = self._start(place, case.ranks, case.stage, None)
            code = end(started, _LIMIT_S)
        if code != EXIT_DONE:
            return [f"it did not go on: {code}, {started.stderr[-500:]}"]
        return _left(place)


def results(run: Path) -> dict[str, Any]:
    """What must be equal in two runs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [
        {key: value for key, value in line.items() if key in ("step", *_SAME) or key.startswith("val/")}
        for line in lines
    ]
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


def _check_end(case: RunCase, outcome: Outcome, _: Place, said: str) -> list[str]:
    code, kind = outcome.code, KINDS[case.kind]
    if code is None:
        return [f"it hung for {_LIMIT_S} s"]
    # a stopped rank's peers and a rank that is found first speak of a lost rank
    if code == EXIT_DONE:
        hidden = outcome.injected > 0 and case.kind in ("weight", "adapter", "nan", "stop", "port")
        return [f"{case.kind} was not detected"] if hidden else []
    if code not in kind.codes:
        return [f"exit code {code} instead of {sorted(kind.codes)}: {outcome.said}"]
    if "Traceback" in said and case.kind != "raise":
        return [f"a trace: {outcome.said}"]
    return [] if kind.says in said else [f"it did not say '{kind.says}': {outcome.said}"]


def _check_saved(case: RunCase, _: Outcome, place: Place, __: str) -> list[str]:
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


def _rubbish(place: Place, before: set[str]) -> list[str]:
    """Temporary files and shared memory that are left when the run is done."""
    found = [f"{name} is left in the temporary folder" for name in os.listdir(place.folder / "tmp")]
    pids = {file.read_text().split()[0] for file in place.processes.glob("[!.]*")}
    for name in shared_memory() - before:
        if any(pid in name for pid in pids):
            found.append(f"/dev/shm/{name} is left")
    return found


def _differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
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
    if case.kind == "torn":
        with (place.run / "metrics.jsonl").open("ab") as file:
            file.write([b'{"step": 11, "tra', b"\0" * 512, b"\xff\n"][case.fault.detail % 3])
    newest = checkpoint.newest(place.run / "checkpoints")
    if case.kind not in ("bit", "cut") or newest is None:
        return None
    files = sorted(path for path in newest.iterdir() if path.name != "COMPLETE")
    file = files[case.fault.detail % len(files)]
    content = bytearray(file.read_bytes())
    if case.kind == "cut":
        del content[case.fault.detail % len(content) :]
    else:
        content[case.fault.detail // 8 % len(content)] ^= 1 << case.fault.detail % 8
    file.write_bytes(content)
    return newest
