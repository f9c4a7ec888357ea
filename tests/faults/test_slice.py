"""A short slice of the campaign in `benchmarks/faults.py`: the same cases each time, one of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.case import Family
from tests.faults.families import made
from tests.faults.jobs import Jobs
from tests.faults.records import Records
from tests.faults.runs import Runs
from tests.slurms import SlurmLab


@pytest.mark.slow
def test_faults_in_runs(tmp_path: Path) -> None:
    assert_nothing_is_lost(made(Runs, tmp_path))


@pytest.mark.slow
def test_faults_in_what_records_runs(tmp_path: Path) -> None:
    assert_nothing_is_lost(made(Records, tmp_path))


@pytest.mark.slurm
def test_faults_in_jobs(slurm: SlurmLab, tmp_path: Path) -> None:
    """That end each job in another way: by Slurm, a failure, its user and a signal; and one of an array."""
    kinds = ("job-requeue", "job-srun", "job-cancel", "job-signal", "job-array")
    assert_nothing_is_lost(Jobs(tmp_path, slurm), 0, kinds)


def assert_nothing_is_lost(family: Family, seed: int = 1, kinds: Sequence[str] = ()) -> None:
    """A case of each kind, or of each of these.

    Args:
        seed: one for which every fault happens.
    """
    kinds = kinds or family.kinds
    cases = [family.draw(kind, seed) for kind in kinds]
    try:
        family.prepare(cases)
        with ThreadPoolExecutor(family.at_once) as pool:
            outcomes = list(pool.map(family.run, cases))
    finally:
        family.close()
    failed = [outcome for outcome in outcomes if outcome.problems]
    assert not failed, "\n".join(map(str, failed))
    assert {outcome.kind for outcome in outcomes if outcome.injected} == set(kinds)
