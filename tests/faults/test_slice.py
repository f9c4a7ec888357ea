"""A short slice of the campaign in `benchmarks/faults.py`: the same cases each time, of every kind that is quick."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.case import Family
from tests.faults.families import made
from tests.faults.runs import Runs

WAITS = ("stop", "port")
"""Kinds that wait for a timeout."""


@pytest.mark.slow
def test_faults_in_runs_lose_nothing_and_change_nothing(tmp_path: Path) -> None:
    assert_nothing_is_lost(made(Runs, tmp_path), seeds=2, without=WAITS)


def assert_nothing_is_lost(family: Family, seeds: int, without: tuple[str, ...] = ()) -> None:
    kinds = [kind for kind in family.kinds if kind not in without]
    cases = [family.draw(kind, seed) for seed in range(seeds) for kind in kinds]
    try:
        family.prepare(cases)
        with ThreadPoolExecutor(family.at_once) as pool:
            outcomes = list(pool.map(family.run, cases))
    finally:
        family.close()
    failed = [outcome for outcome in outcomes if outcome.problems]
    assert not failed, "\n".join(map(str, failed))
    assert {outcome.kind for outcome in outcomes if outcome.injected} == set(kinds)
