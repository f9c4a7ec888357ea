"""A short slice of the campaign in `benchmarks/faults.py`: the same cases each time, of every kind that is quick."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.cases import KINDS, Campaign, draw

pytestmark = pytest.mark.slow

CASES = [draw(kind, seed) for seed in range(2) for kind in KINDS if kind not in ("stop", "port")]
"""Without what waits for a timeout."""


def test_faults_lose_nothing_and_change_nothing(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path / "campaign")
    for case in CASES:
        campaign.undisturbed(case.ranks, case.stage)
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(campaign.run, CASES))
    failed = [outcome for outcome in outcomes if outcome.problems]
    assert not failed, "\n".join(map(str, failed))
    assert {outcome.kind for outcome in outcomes if outcome.happened} == {case.kind for case in CASES}
