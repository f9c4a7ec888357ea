"""Faults in searches: a search with faults, and the same going on after it.

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

import json
import os
import random
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from gpc_dist.distributed import checkpoint
from gpc_dist.errors import EXIT_DONE
from tests.faults.case import Outcome, end, left, shared_memory, tiny_inputs
from tests.faults.search_checks import consistent, differences, results
from tests.faults.search_kinds import (
    EVERY,
    KINDS,
    LANES,
    SCHEDULERS,
    STEPS,
    TRIALS,
    SearchCase,
    described,
    draw_strike,
)
from tests.faults.strike import PLACE, SearchPlace, Strike, launch
from tests.processes import Started, start_call
from tests.rays import ray_cluster

_LIMIT_S = 600
"""Longest wait for a command, in which a pack may start four times, on a machine that others share."""
_END_S = 60
"""Within which all processes of a search have ended when its driver has: there are some ten, beside other cases."""
_MOST_STARTS = 4
"""After the last fault: one, and others after what a refusal says is to be done."""
_UNSAVED = "was stopped, but not saved: --resume does it again"
_HOLDING = Path(__file__).parents[1] / "holding"

_SCHEDULERS: dict[str, dict[str, Any]] = {
    "random": {"name": "fifo"},
    "asha": {"name": "asha", "grace_steps": EVERY, "reduction_factor": 2},
    "pbt": {"name": "pbt", "perturb_every": EVERY, "quantile_fraction": 0.5},
}


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
        scheduler, packed = chance.choice(SCHEDULERS), chance.random() < 0.5
        strikes = [draw_strike(chance, how, scheduler) for _ in range(how.times)]
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
        outcome = Outcome(case.kind, case.seed, described(case))
        outcome.problems = self._carry_out(case, place, outcome)
        if not outcome.problems:
            try:
                found = results(place.run)
                outcome.problems = consistent(case, found, alone)
                if same is not None:
                    outcome.problems += differences(found, same, case.packed)
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


@contextmanager
def _ray(case: SearchCase, strikes: bool) -> Iterator[dict[str, str]]:
    """Where the start finds its Ray."""
    if case.kind == "search-cluster-SIGKILL" and strikes:
        with ray_cluster() as environment:
            yield environment
    else:
        yield {}


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
