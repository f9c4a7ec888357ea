"""Faults in searches: what is drawn, and what must hold after it and after the search has gone on.

All searches try the same four configurations. Alone, each is one run of the first of these searches, the reference; the
others share its figures as far as a trial gets in them:

* `random`: every trial runs to its end.
* `asha`: one trial at a time, so that the same are stopped at the same rungs with and without faults. Packed, the
  order in which lanes report decides: each rung is then checked by itself.
* `pbt`: the order of reports decides who copies whom, and chance what is changed. Each trial is checked up to its first
  copy, and that its steps go up.

A trial alone in its pack is to be the reference's bit for bit; one among others up to the order of sums.
"""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from gpc_dist.distributed import checkpoint
from gpc_dist.errors import EXIT_DONE, EXIT_ENVIRONMENT, EXIT_STOPPED
from tests.faults.case import Case, Outcome, end, left, shared_memory, tiny_inputs
from tests.faults.strike import PLACE, SearchPlace, Strike, launch
from tests.processes import Started, start_call
from tests.rays import ray_cluster

TRIALS, LANES, STEPS, EVERY = 4, 2, 16, 4
"""Trials of a search, those that share a pack, steps of a trial, and steps between its evaluations."""
_LIMIT_S = 600
"""Longest wait for a command, in which a pack may start four times, on a machine that others share."""
_END_S = 60
"""Within which all processes of a search have ended when its driver has: there are some ten, beside other cases."""
_MOST_STARTS = 4
"""After the last fault: one, and others after what a refusal says is to be done."""
_UNSAVED = "was stopped, but not saved: --resume does it again"
_SAME = ("train/loss", "train/grad_norm", "train/lr_factor", "train/epoch")
_HOLDING = Path(__file__).parents[1] / "holding"

_SCHEDULERS: dict[str, dict[str, Any]] = {
    "random": {"name": "fifo"},
    "asha": {"name": "asha", "grace_steps": EVERY, "reduction_factor": 2},
    "pbt": {"name": "pbt", "perturb_every": EVERY, "quantile_fraction": 0.5},
}


@dataclass(frozen=True)
class SearchCase(Case):
    scheduler: str
    packed: bool
    starts: tuple[tuple[Strike, ...], ...]
    """Faults of each start of the search; those that follow have none."""

    @property
    def exact(self) -> bool:
        """Whether a search without a fault decides the same."""
        return self.scheduler == "random" or (self.scheduler == "asha" and not self.packed)


_RANK = ("open", "add", "step", "evaluation", "save", "sync", "saved", "close")
_TRIAL = ("join", "report", "leave")
_DRIVER = ("start", "write", "heard", "note", "noted", "end")
_COUNTS = {"start": 7, "write": 5, "end": 4}
"""Of the moments of a search that has one process, how many there are."""
_EVALUATIONS = ("evaluation", "save", "saved", "report", "heard")


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    what: str
    """See `Strike.kind`."""
    moments: tuple[str, ...]
    codes: frozenset[int] = frozenset()
    """Exit codes that are right, apart from 0 of a search that the fault did not reach or harm."""
    target: str = "self"
    times: int = 3
    """Faults of a case: in one start where the search goes on by itself, otherwise each in a start of its own."""
    detail: Callable[[random.Random], int] = lambda _: 0
    says: str = ""
    """What the error must say, if there is one."""
    survives: bool = False
    """Whether the search ends as if there were no fault, with all trials."""

    @property
    def ends(self) -> bool:
        return bool(self.codes)


def _pause(draw: random.Random) -> int:
    return draw.randrange(50, 1500)


def _errno(draw: random.Random) -> int:
    return draw.choice([errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])


def _quota(draw: random.Random) -> int:
    return int(2 ** draw.uniform(10, 14))


def _bit(draw: random.Random) -> int:
    return draw.randrange(2**16)


def _driver(name: str, *codes: int) -> Kind:
    number = signal.Signals[name]
    return Kind(name, (*_RANK, *_TRIAL, *_DRIVER), frozenset({128 + number, -number, *codes}), "driver")


_MACHINE = frozenset({EXIT_ENVIRONMENT})
_SAVED = ("step", "report", "heard")
_INSIDE = (*_RANK, *_TRIAL, "heard", "note")

KINDS: dict[str, Kind] = {
    "search-driver-SIGKILL": _driver("SIGKILL"),
    "search-driver-SIGTERM": _driver("SIGTERM", EXIT_STOPPED),
    "search-driver-SIGINT": _driver("SIGINT", EXIT_STOPPED),
    "search-driver-pause": Kind(
        "pause", (*_RANK, *_TRIAL, *_DRIVER), target="driver", times=6, detail=_pause, survives=True
    ),
    "search-driver-error": Kind("error", ("write",), _MACHINE, detail=_errno),
    "search-driver-quota": Kind("quota", _DRIVER, _MACHINE, detail=_quota),
    "search-trial-SIGKILL": Kind("SIGKILL", _TRIAL, survives=True),
    "search-trial-pause": Kind("pause", _TRIAL, times=6, detail=_pause, survives=True),
    "search-trial-raise": Kind("raise", _TRIAL, survives=True),
    "search-trial-error": Kind("error", ("join", "report"), detail=_errno, survives=True),
    "search-rank-SIGKILL": Kind("SIGKILL", _RANK, survives=True),
    "search-rank-pause": Kind("pause", _RANK, times=6, detail=_pause, survives=True),
    "search-rank-raise": Kind("raise", _RANK, survives=True),
    "search-rank-memory": Kind("memory", _RANK, survives=True),
    "search-rank-error": Kind("error", ("add", "save", "sync", "close"), detail=_errno, survives=True),
    "search-rank-quota": Kind("quota", _RANK, detail=_quota),
    "search-lane-nan": Kind("lane", ("step",), times=1),
    "search-packs-SIGKILL": Kind("SIGKILL", _INSIDE, _MACHINE, "packs"),
    "search-gcs-SIGKILL": Kind("SIGKILL", _INSIDE, _MACHINE, "gcs_server", times=1),
    "search-raylet-SIGKILL": Kind("SIGKILL", _INSIDE, _MACHINE, "raylet"),
    "search-cluster-SIGKILL": Kind("SIGKILL", ("start", "heard", "note"), _MACHINE, "cluster", times=1),
    "search-moved": Kind("moved", ("step", "save", "report", "heard", "note"), _MACHINE, times=1),
    "search-torn": Kind("SIGKILL", _SAVED, frozenset({-9, 137}), "driver", times=1, detail=_bit),
    "search-bit": Kind("SIGKILL", _SAVED, frozenset({-9, 137}), "driver", times=1, detail=_bit),
}
"""By name. After `torn` and `bit` the last lines or the newest checkpoints of trials are damaged."""


class Searches:
    """The family of faults in searches; see `Family`."""

    kinds = tuple(KINDS)
    at_once = 2

    def __init__(self, folder: Path):
        self.folder = folder
        self._recipe = tiny_inputs(folder / "inputs")
        self.undisturbed = cache(self._undisturbed)

    def draw(self, kind: str, seed: int) -> SearchCase:
        chance, how = random.Random(f"{kind} {seed}"), KINDS[kind]
        scheduler, packed = chance.choice(list(_SCHEDULERS)), chance.random() < 0.5
        strikes = [_strike(chance, how, scheduler) for _ in range(how.times)]
        if how.ends:
            # a later start has less before it
            strikes.sort(
                key=lambda strike: (strike.number, strike.trial) if packed else (strike.trial, strike.number)
            )
            return SearchCase(kind, seed, scheduler, packed, tuple((strike,) for strike in strikes))
        return SearchCase(kind, seed, scheduler, packed, (tuple(strikes),))

    def prepare(self, cases: Iterable[SearchCase]) -> None:
        for scheduler in ("random", *({"asha"} & {case.scheduler for case in cases})):
            self.undisturbed(scheduler)

    def close(self) -> None:
        pass

    def _undisturbed(self, scheduler: str) -> dict[str, Any]:
        """What a search without a fault leaves, whose trials come one after the other."""
        place = SearchPlace(self.folder / f"undisturbed-{scheduler}")
        if not (place.run / "result.json").exists():
            started = self._start(self._new(place, scheduler, packed=False), ())
            assert end(started, _LIMIT_S) == EXIT_DONE, started.stderr
        return results(place.run)

    def run(self, case: SearchCase) -> Outcome:
        """Run a case; its folder stays if something did not hold."""
        alone = self.undisturbed("random")
        same = self.undisturbed(case.scheduler) if case.exact else None
        began_s = time.monotonic()
        place = self._new(SearchPlace(self.folder / case.name), case.scheduler, case.packed)
        outcome = Outcome(case.kind, case.seed, _described(case))
        outcome.problems = self._carry_out(case, place, outcome)
        if not outcome.problems:
            try:
                found = results(place.run)
                outcome.problems = _consistent(case, found, alone)
                if same is not None:
                    outcome.problems += _differences(found, same, case.packed)
            except (OSError, ValueError, KeyError) as error:
                outcome.problems.append(f"there are no whole results: {error!r}")
            outcome.problems += _rubbish(place)
            outcome.same = not outcome.problems
        outcome.seconds = round(time.monotonic() - began_s, 1)
        if not outcome.problems:
            shutil.rmtree(place.folder)
        return outcome

    def _new(self, place: SearchPlace, scheduler: str, packed: bool) -> SearchPlace:
        shutil.rmtree(place.folder, ignore_errors=True)
        place.home.mkdir(parents=True)
        (place.folder / "mine.yaml").write_text(yaml.safe_dump(search(self._recipe, scheduler, packed)))
        return place

    def _start(self, place: SearchPlace, strikes: Iterable[Strike], **ray: str) -> Started:
        place.write(list(strikes))
        words = ["tune", "mine.yaml", *(["--resume"] if (place.run / "search.yaml").exists() else [])]
        own = {
            PLACE: str(place.folder),
            "HOME": str(place.home),
            "PYTHONPATH": os.pathsep.join([str(_HOLDING), os.environ.get("PYTHONPATH", "")]),
            "RAY_worker_niceness": "0",
        }
        return start_call(launch, words, cwd=place.folder, **own, **ray)

    def _carry_out(self, case: SearchCase, place: SearchPlace, outcome: Outcome) -> list[str]:
        """Start the search until it has ended with all its trials. Returns what did not hold."""
        said = place.folder / "stderr"
        for number in range(len(case.starts) + _MOST_STARTS):
            strikes = case.starts[number] if number < len(case.starts) else ()
            with _ray(case, bool(strikes)) as ray:
                started = self._start(place, strikes, **ray)
                code = end(started, _LIMIT_S)
                problems = left(place.processes, _END_S)
            said.write_text(started.stderr)
            (place.folder / "stdout").write_text(started.stdout)
            injected = place.happened()
            outcome.injected += injected
            if injected or outcome.code is None:
                outcome.code, outcome.said = code, next(reversed(started.stderr.strip().splitlines()), "")
            problems += _check_end(case, injected, code, started.stderr)
            if problems:
                return problems
            whole = code == EXIT_DONE and json.loads((place.run / "result.json").read_text())["failed"] == 0
            if number + 1 >= len(case.starts) and whole:
                return []
            # Ray Tune tries no trial again that loses a process in which it was to follow another, nor one that it
            # has stopped and that could not save
            leaves = any(strike.moment == "leave" for strike in strikes)
            unsaved = _UNSAVED in started.stderr
            if code == EXIT_DONE and injected and KINDS[case.kind].survives and not (leaves or unsaved):
                return [f"trials failed: {started.stderr[-500:]}"]
            _mend(place, started.stderr)
            if number == 0:
                _damage(case, place)
        return [f"it did not end: {code}, {started.stderr[-500:]}"]


def search(recipe: Path, scheduler: str, packed: bool) -> dict[str, Any]:
    """A specification."""
    one = (
        {"pack": 1, "concurrent": 2, "cpus_per_rank": 1}
        if scheduler == "pbt"
        else {"pack": 1, "concurrent": 1}
    )
    return {
        "recipe": str(recipe),
        "settings": {"train.steps": STEPS, "train.eval_every": EVERY, "train.schedule": "constant"},
        "space": {"train.lr": {"loguniform": [1e-4, 1e-1]}},
        "trials": TRIALS,
        "seed": 1,
        "scheduler": _SCHEDULERS[scheduler],
        "resources": {"pack": LANES, "cpus_per_rank": os.cpu_count()} if packed else one,
        "retries": 4,
        "tracking": {"enabled": False},
    }


def _strike(chance: random.Random, how: Kind, scheduler: str) -> Strike:
    moment, trial = chance.choice(how.moments), chance.randrange(TRIALS)
    # of those that a scheduler may stop, what they do in any case
    steps = EVERY if scheduler == "asha" and trial else STEPS
    if moment in _COUNTS or moment == "open":
        trial, number = 0, chance.randint(1, _COUNTS.get(moment, 1))
    elif moment in _EVALUATIONS:
        number = EVERY * chance.randint(1, steps // EVERY)
    elif how.what == "lane":  # what is skipped is not to be saved
        number = EVERY * chance.randrange(steps // EVERY) + 1
    elif moment == "step":
        number = chance.randint(1, steps)
    else:
        number = chance.randint(1, {"sync": 6, "note": 2, "noted": 2}.get(moment, 1))
    return Strike(how.what, moment, trial, number, how.target, how.detail(chance))


def _described(case: SearchCase) -> str:
    places = [
        f"{strike.moment} {strike.number} of {strike.trial:03d} ({strike.target} {strike.detail})"
        for strikes in case.starts
        for strike in strikes
    ]
    return f"{case.scheduler}, {'packed' if case.packed else 'one by one'}: {', '.join(places)}"


@contextmanager
def _ray(case: SearchCase, strikes: bool) -> Iterator[dict[str, str]]:
    """Where the start finds its Ray."""
    if case.kind == "search-cluster-SIGKILL" and strikes:
        with ray_cluster() as environment:
            yield environment
    else:
        yield {}


def results(folder: Path) -> dict[str, Any]:
    """What must be equal in two searches."""
    result = json.loads((folder / "result.json").read_text())
    del result["wall_s"]
    trials = [_trial(path) for path in sorted((folder / "trials").iterdir())]
    return {"result": result, "trials": trials}


def _trial(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "trial.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [
        {key: value for key, value in line.items() if key in ("step", *_SAME) or key.startswith("val/")}
        for line in lines
    ]
    newest = checkpoint.newest(folder / "checkpoints")
    if newest is None:
        raise ValueError(f"{folder} has no checkpoint")
    return {
        "number": record["number"],
        "settings": record["settings"],
        "seed": record["seed"],
        "decision": record["decision"],
        "state": json.loads((folder / "status.json").read_text())["state"],
        "best": json.loads((folder / "result.json").read_text())["metrics"]["best"],
        "copied": (folder / "started-from").exists(),
        "metrics": metrics,
        "times": [line["time_s"] for line in lines if "val/accuracy" in line],
        "adapter": (folder / "adapter" / "adapter.safetensors").read_bytes(),
        "weights": (newest / "trained.safetensors").read_bytes(),
        "saved": checkpoint.step_of(newest),
    }


def _check_end(case: SearchCase, injected: int, code: int | None, said: str) -> list[str]:
    kind = KINDS[case.kind]
    if code is None:
        return [f"it hung for {_LIMIT_S} s"]
    if code == EXIT_DONE:
        return []
    last = next(reversed(said.strip().splitlines()), "")
    if not injected or code not in kind.codes:
        return [f"exit code {code} instead of {sorted(kind.codes)}: {last}"]
    if "Traceback" in said:
        return [f"a trace: {last}"]
    return [] if kind.says in said else [f"it did not say '{kind.says}': {last}"]


def _rubbish(place: SearchPlace) -> list[str]:
    """What is left when the search is done."""
    found = [f"{path} is left" for path in place.run.rglob(".*") if path.name != ".lock"]
    found += [
        f"{path} is left" for path in place.home.rglob("*") if "ray" in path.name or "token" in path.name
    ]
    pids = set(place.drivers())
    for path in Path("/tmp").glob("gpc-ray-*/r/session_*"):
        if path.name.rpartition("_")[2] in pids:
            found.append(f"{path} is left")
    found += [f"/dev/shm/{name} is left" for name in shared_memory() if pids & set(re.split("[-_.]", name))]
    return found


def _mend(place: SearchPlace, said: str) -> None:
    """Do what the messages say is to be done."""
    if place.moved.exists():
        shutil.rmtree(place.run, ignore_errors=True)
        place.moved.rename(place.run)
    for trial in (place.run / "trials").glob("*"):
        newest = checkpoint.newest(trial / "checkpoints")
        if newest is not None and f"checkpoint {newest} is damaged" in said:
            shutil.rmtree(newest)


def _damage(case: SearchCase, place: SearchPlace) -> None:
    """Damage what a killed search has left of each trial that has not ended."""
    detail = case.starts[0][0].detail
    for trial in (place.run / "trials").glob("*"):
        file, newest = trial / "metrics.jsonl", checkpoint.newest(trial / "checkpoints")
        ended = json.loads((trial / "trial.json").read_text())["decision"] != "running"
        if case.kind == "search-torn" and file.exists():
            with file.open("ab") as log:
                log.write([b'{"step": 11, "tra', b"\0" * 512, b"\xff\n"][detail % 3])
        if case.kind == "search-bit" and newest is not None and not ended:
            files = sorted(path for path in newest.iterdir() if path.name != "COMPLETE")
            damaged = files[detail % len(files)]
            content = bytearray(damaged.read_bytes())
            content[detail // 8 % len(content)] ^= 1 << detail % 8
            damaged.write_bytes(content)


def _consistent(case: SearchCase, found: dict[str, Any], alone: dict[str, Any]) -> list[str]:
    """What does not hold of each trial by itself."""
    problems = []
    if len(found["trials"]) != TRIALS:
        return [f"{len(found['trials'])} trials"]
    for mine, reference in zip(found["trials"], alone["trials"], strict=True):
        name = f"trial {mine['number']:03d}"
        steps = [line["step"] for line in mine["metrics"] if "train/loss" in line]
        evaluated = [line["step"] for line in mine["metrics"] if "val/accuracy" in line]
        if mine["copied"]:
            if steps != sorted(set(steps)) or evaluated != sorted(set(evaluated)) or steps[-1] != STEPS:
                problems.append(f"{name} has steps {steps} and evaluations {evaluated}")
            continue
        last = max(steps, default=0)
        if steps != list(range(1, last + 1)) or evaluated != list(range(EVERY, last + 1, EVERY)):
            problems.append(f"{name} has steps {steps} and evaluations {evaluated}")
        elif mine["settings"] != reference["settings"] or mine["seed"] != reference["seed"]:
            problems.append(f"{name} has other settings: {mine['settings']}")
        else:
            problems += _unlike(name, mine["metrics"], reference["metrics"], case.packed)
        stopped = mine["decision"] == "stopped by scheduler" and case.scheduler == "asha" and last in (4, 8)
        if not (stopped or (mine["decision"] == "completed" and last == STEPS)):
            problems.append(f"{name} is {mine['decision']} at step {last}")
        if mine["state"] != ("stopped" if stopped else "finished"):
            problems.append(f"{name} is {mine['decision']}, and its run {mine['state']}")
    return problems + _rungs(case, found) + _best(found)


def _unlike(name: str, mine: list[Any], theirs: list[Any], packed: bool) -> list[str]:
    """What differs in a trial's lines, which may be fewer."""
    for line, reference in zip(mine, theirs, strict=False):
        if packed:
            keys = [key for key in reference if key not in ("train/grad_norm", "val/accuracy")]
            same = line.keys() == reference.keys() and all(
                math.isclose(line[key], reference[key], rel_tol=1e-2, abs_tol=1e-4) for key in keys
            )
        else:
            same = line == reference
        if not same:
            return [f"{name} differs at step {line['step']}: {line} instead of {reference}"]
    return []


def _rungs(case: SearchCase, found: dict[str, Any]) -> list[str]:
    """A trial that was stopped at a rung was not the best of those that came there."""
    if case.scheduler != "asha":
        return []
    values = [
        {line["step"]: line["val/accuracy"] for line in trial["metrics"] if "val/accuracy" in line}
        for trial in found["trials"]
    ]
    problems = []
    for trial, own in zip(found["trials"], values, strict=True):
        rung = max(own)
        if trial["decision"] != "completed" and own[rung] >= max(each.get(rung, 0.0) for each in values):
            problems.append(f"trial {trial['number']:03d} was stopped at step {rung}, where it was the best")
    return problems


def _best(found: dict[str, Any]) -> list[str]:
    values = [
        max(line["val/accuracy"] for line in trial["metrics"] if "val/accuracy" in line)
        for trial in found["trials"]
        if not trial["copied"]
    ]
    result = found["result"]
    ends = [trial["decision"] for trial in found["trials"]]
    counted = {
        "trials": len(ends),
        "finished": ends.count("completed"),
        "stopped": ends.count("stopped by scheduler"),
        "failed": ends.count("failed"),
    }
    problems = [
        f"{key} is {result[key]}, not {count}" for key, count in counted.items() if result[key] != count
    ]
    if values and result["best"] < max(values):
        problems.append(f"the best is {result['best']}, and a trial has {max(values)}")
    return problems


def _differences(found: dict[str, Any], same: dict[str, Any], packed: bool) -> list[str]:
    """What differs from the search without a fault, which decides the same."""
    keys = ("decision", "saved") if packed else ("decision", "saved", "metrics", "best", "adapter", "weights")
    problems = [
        f"trial {mine['number']:03d} has another {key}"
        for mine, theirs in zip(found["trials"], same["trials"], strict=True)
        for key in keys
        if mine[key] != theirs[key]
    ]
    if not packed and found["result"] != same["result"]:
        problems.append(f"result {found['result']} instead of {same['result']}")
    return problems
