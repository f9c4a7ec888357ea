"""A short slice of the campaign's searches: beside others that start a Ray, so not in the file of the runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.families import made
from tests.faults.searches import Searches
from tests.faults.test_slice import assert_nothing_is_lost

KINDS = ("search-trial-SIGKILL", "search-rank-SIGKILL", "search-torn")
"""Of those that end processes or their files: a lane that fails is in the tests of packs and of searches, too."""


@pytest.mark.slow
@pytest.mark.ray
def test_faults_in_searches_lose_nothing_and_change_nothing(tmp_path: Path) -> None:
    assert_nothing_is_lost(made(Searches, tmp_path), 0, KINDS)
