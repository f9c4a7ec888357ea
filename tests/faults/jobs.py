"""Faults in Slurm jobs: what is drawn, and what must hold when the job has ended, or was submitted once more."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from threading import Lock, Semaphore

import psutil

from tests.faults import inject
from tests.faults.case import Outcome, left, noted, shared_memory
from tests.faults.disturb import KINDS, LIMIT_S, Job, JobCase, sent
from tests.faults.inject import Fault, Place
from tests.faults.records import first_use
from tests.faults.run_kinds import TIMEOUT_S
from tests.faults.runs import Runs, differences, rubbish
from tests.forks import Forks
from tests.processes import start_call
from tests.slurms import ENDED, ROOT, SCRIPT, SlurmLab, recorded_once, slurm_lab

_LEAVE_S = 40
"""The exporter of a rank that was killed tells MLflow the rest, for 30 s where it has to try again."""
_STEPS = 12
_RECORD = (".tracking.lock", "tracking.json", "tracking.log")
"""Files of a run that is recorded in MLflow."""


class Jobs:
    """The family of faults in Slurm jobs; see `Family`.

    Args:
        lab: a cluster that others use too; without one it has its own.
    """

    kinds = tuple(KINDS)
    at_once = 3
    """Jobs wait for Slurm most of the time."""

    def __init__(self, folder: Path, lab: SlurmLab | None = None):
        self.folder = folder
        alone = folder / "undisturbed"
        alone.mkdir(exist_ok=True)
        self._runs = Runs(alone)
        self._given = lab
        self._held = ExitStack()
        self._turns, self._order = Semaphore(self.at_once), Lock()

    def draw(self, kind: str, seed: int) -> JobCase:
        chance, how = random.Random(f"{kind} {seed}"), KINDS[kind]
        nodes, ranks, stage = chance.choice(how.arrangements)
        # the files of a run are written by rank 0
        rank = 0 if how.injected == "quota" else chance.randrange(ranks)
        detail = int(2 ** chance.uniform(12, 17))
        fault = Fault(how.injected, chance.choice(how.moments), 0, rank, detail=detail)
        tracked, cold = chance.random() < 0.2, chance.random() < 0.05
        tracked = tracked and how.tracked
        return JobCase(kind, seed, nodes, ranks, stage, fault, chance.random(), tracked, cold, how.tasks)

    def prepare(self, cases: Iterable[JobCase]) -> None:
        for ranks, stage in sorted({(case.ranks, case.stage) for case in cases}):
            self._runs.undisturbed(ranks, stage)
        self._lab = self._given or self._held.enter_context(slurm_lab())
        self._forks = Forks(inject.join)
        self._held.callback(self._forks.close)

    def close(self) -> None:
        self._held.close()

    def run(self, case: JobCase) -> Outcome:
        """Run a case; its folder stays if something did not hold."""
        count = self.at_once if KINDS[case.kind].alone else 1
        with self._order:  # who waits for all turns is not passed by
            for _ in range(count):
                self._turns.acquire()
        try:
            return self._run(case)
        finally:
            self._turns.release(count)

    def _run(self, case: JobCase) -> Outcome:
        began_s = time.monotonic()
        folder = self.folder / case.name
        shutil.rmtree(folder, ignore_errors=True)
        fault = self._runs.at_visit(case.fault, case.at, case.ranks, case.stage)
        case = replace(case, fault=fault)
        outcome = Outcome(case.kind, case.seed, _described(case))
        before = shared_memory()
        places = self._places(case, folder)
        if case.tracked:
            for place in places:
                shutil.copy(self._store, place.disk / "mlflow.db")
        job = Job(self._lab, case, folder, lambda: self._submit(case, folder))
        try:
            try:
                with job.afterwards:
                    self._disturb(job, outcome)
            except AssertionError as error:  # it took too long
                outcome.problems.append(str(error))
                job.call("scancel", "--quiet", job.submitted)
            outcome.problems += left(lambda: [*job.processes(), *_living(places)], _LEAVE_S)
            if not outcome.problems:
                outcome.problems += self._check(job, outcome)
            if not outcome.problems and job.state()["JobState"] != "COMPLETED":
                outcome.problems += _go_on(job)
            if not outcome.problems:
                for place in places:
                    outcome.problems += self._differences(case, place) + rubbish(place, before)
                outcome.same = not outcome.problems
        finally:
            job.free()
        outcome.seconds = round(time.monotonic() - began_s, 1)
        if not outcome.problems:
            shutil.rmtree(folder)
        return outcome

    def _disturb(self, job: Job, outcome: Outcome) -> None:
        """Disturb the job, and wait for its end."""
        happened = job.place.happened(job.case.fault).exists
        job.wait(lambda: happened() or job.state()["JobState"] in ENDED)
        if happened():
            outcome.injected = 1
            KINDS[job.case.kind].disturb(job)
            job.free()
        ids = [f"{job.submitted}_{task}" for task in range(job.case.tasks)] or [job.submitted]
        job.wait(lambda: all(self._lab.job(each)["JobState"] in ENDED for each in ids))

    def _check(self, job: Job, outcome: Outcome) -> list[str]:
        kind, found, said = KINDS[job.case.kind], job.state(), job.said()
        code, number = map(int, found["ExitCode"].split(":"))
        outcome.code = -number or code
        outcome.said = next(reversed(said.strip().splitlines()), "")
        state, restarts = found["JobState"], int(found["Restarts"])
        problems = []
        if not outcome.injected and (state, restarts) != ("COMPLETED", 0):
            problems.append(f"nothing happened, and it is {state} after {restarts} restarts")
        if outcome.injected and state != kind.state:
            problems.append(f"{state} instead of {kind.state}: {outcome.said}")
        if outcome.injected and restarts not in kind.restarts:
            problems.append(f"{restarts} restarts instead of {sorted(kind.restarts)}")
        if restarts and kind.says not in said:
            problems.append(f"it did not say '{kind.says}'")
        if "Traceback" in said:
            problems.append("a trace")
        others = [task for task in range(job.case.tasks) if task != job.case.task]
        problems += [
            f"task {task} of the array was started again too"
            for task in others
            if self._lab.job(f"{job.submitted}_{task}")["Restarts"] != "0"
        ]
        if lost := job.place.losses.read_text() if job.place.losses.exists() else job.place.lost():
            problems.append(lost)
        notes = job.folder / ".gpc-dist-jobs"
        if state == "COMPLETED" and (names := sorted(os.listdir(notes))):
            problems.append(f"notes of the job are left: {names}")
        return problems

    def _differences(self, case: JobCase, place: Place) -> list[str]:
        theirs = self._runs.undisturbed(case.ranks, case.stage)
        if not case.tracked:
            return differences(place.run, theirs)
        found = differences(place.run, theirs | {"files": sorted([*theirs["files"], *_RECORD])})
        try:
            recorded_once(place.run, _STEPS)
        except (AssertionError, ValueError) as error:
            found.append(f"MLflow: {error}")
        return found

    @cached_property
    def _store(self) -> Path:
        """An MLflow store that has been used, see `mlflow_store`."""
        file = self.folder / "mlflow.db"
        if not file.exists():
            new = file.with_name("new.db")
            new.unlink(missing_ok=True)
            start_call(first_use, new).wait()
            new.rename(file)
        return file

    def _places(self, case: JobCase, folder: Path) -> list[Place]:
        """Those of the job, or of the tasks of the array, with the faults that its ranks read."""
        places = [Place(folder / str(task)) for task in range(case.tasks)] or [Place(folder)]
        for number, place in enumerate(places):
            (place.folder / "tmp").mkdir(parents=True)
            place.disk.mkdir()
            mine = not case.tasks or number == case.task
            fault = case.fault if mine else replace(case.fault, moment="never")
            place.fault.write_text(json.dumps(asdict(fault)))
        return places

    def _submit(self, case: JobCase, folder: Path) -> str:
        options = [f"--nodes={case.nodes}", f"--ntasks-per-node={case.ranks // case.nodes}"]
        if case.tasks:
            options.append(f"--array=0-{case.tasks - 1}")
        place = Place(folder / "{task}" if case.tasks else folder)
        settings = ["--run.dir", place.run, "--train.keep_last", 1, "--engine.timeout_s", TIMEOUT_S]
        settings += ["--engine.zero_stage", case.stage, "--tracking.enabled", str(case.tracked).lower()]
        settings += ["--tracking.finish_timeout_s", LIMIT_S]
        words = [*options, *KINDS[case.kind].options, SCRIPT, self._runs.recipe, *settings]
        paths = [str(ROOT), str(ROOT / "tests" / "holding")]
        environment = {} if case.cold else self._forks.environment
        if not case.tracked:  # or rank 0 waits for MLflow after the others have ended
            environment |= {"SLURM_WAIT": "15"}
        return self._lab.submit(
            *words,
            cwd=folder,
            TESTS_JOB=str(folder),
            TMPDIR=str(folder / ("0" if case.tasks else "") / "tmp"),
            TORCHINDUCTOR_CACHE_DIR=str(self.folder / "compiled"),
            OMP_NUM_THREADS="1",
            PYTHONPATH=os.pathsep.join(paths),
            **environment,
        )


def _described(case: JobCase) -> str:
    fault = case.fault
    nodes = f"{case.ranks} rank(s) on {case.nodes} node(s), stage {case.stage}"
    ways = [name for name in ("tracked", "cold") if getattr(case, name)]
    ways += [" ".join((sent(case)[0], *sent(case)[1]))] if case.kind == "job-signal" else []
    ways += [f"task {case.task} of {case.tasks}"] if case.tasks else []
    return ", ".join([f"{fault.moment} {fault.visit} of rank {fault.rank} of {nodes}", *ways])


def _living(places: Iterable[Place]) -> Iterator[psutil.Process]:
    for place in places:
        yield from noted(place.processes)


def _go_on(job: Job) -> list[str]:
    """Submit the job once more."""
    job.submit_again()
    found = job.lab.wait(job.id)
    if (found["JobState"], found["Restarts"]) != ("COMPLETED", "0"):
        return [f"submitted once more, it is {found['JobState']}: {job.said()[-500:]}"]
    return left(job.processes, _LEAVE_S)
