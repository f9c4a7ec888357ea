"""A short slice of the campaign in `benchmarks/faults.py`: the same cases each time, one of every kind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.case import Family
from tests.faults.families import made
from tests.faults.records import Records
from tests.faults.runs import Runs


@pytest.mark.slow
def test_faults_in_runs(tmp_path: Path) -> None:
    assert_nothing_is_lost(made(Runs, tmp_path))


@pytest.mark.slow
def test_faults_in_what_records_runs(tmp_path: Path) -> None:
    assert_nothing_is_lost(made(Records, tmp_path))


def assert_nothing_is_lost(family: Family, seed: int = 1) -> None:
    """A case of each kind.

    Args:
        seed: one for which every fault happens.
    """
    cases = [family.draw(kind, seed) for kind in family.kinds]
    try:
        family.prepare(cases)
        with ThreadPoolExecutor(family.at_once) as pool:
            outcomes = list(pool.map(family.run, cases))
    finally:
        family.close()
    failed = [outcome for outcome in outcomes if outcome.problems]
    assert not failed, "\n".join(map(str, failed))
    assert {outcome.kind for outcome in outcomes if outcome.injected} == set(family.kinds)
