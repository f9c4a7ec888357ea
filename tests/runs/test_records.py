"""Records of runs, whose configuration others may have written."""

from __future__ import annotations

from typing import Any

import pytest

from gpc_dist.config import LARGEST_SEED
from gpc_dist.runs.records import make_record


@pytest.mark.parametrize(
    ("given", "seed"),
    [
        (7, 7),
        ("7", 7),
        (LARGEST_SEED, LARGEST_SEED),
        *((wrong, 0) for wrong in (None, -1, "", "x", [None], {"a": 1}, True, 0.5, "9" * 5000)),
    ],
)
def test_a_seed_is_a_number_or_none(given: Any, seed: int) -> None:
    config = {"run": {"seed": given}, "task": {"metric": ["accuracy"]}}
    lines = [{"step": 1, "val/accuracy": 0.5}]
    record = make_record(
        "run", config=config, result=None, facts={}, lines=lines, state="", reason="", started_s=0.0, again=[]
    )
    assert record.seed == seed
