"""What a study is said to take before it is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpc_dist.study import dry_run
from gpc_dist.study.spec import StudySpec

STEPS, ROWS = 100_000, 100_000
"""So many that a tiny encoder keeps a GPU busy for hours."""


@pytest.mark.slow
def test_every_configuration_is_counted_at_its_own_cost(tiny_encoder: Path) -> None:
    def method(*lengths: int, start: str = "vocab") -> dict[str, object]:
        return {
            "settings": {"adapter.method": "prompt-tuning", "adapter.prompt_init": start},
            "space": {"adapter.prompt_tokens": {"grid": list(lengths)}},
        }

    study = StudySpec.model_validate(
        {
            "encoder": {"path": str(tiny_encoder)},
            "tasks": {
                "rte": {"settings": {"train.steps": STEPS, "train.batch_size": ROWS, "data.max_length": 16}}
            },
            "methods": {"short": method(3), "long": method(40), "both": method(3, 40, start="uniform")},
            "trials": 2,
        }
    )
    lines = [line.split() for line in dry_run.describe(study, "h100").splitlines()]
    runs = {line[1]: int(line[3]) for line in lines if line[:1] == ["rte"]}
    hours = {line[1]: float(line[5].replace(",", "")) for line in lines if line[:1] == ["rte"]}
    # a single configuration is not searched
    assert runs == {"short": 3, "long": 3, "both": 5}
    # one run with the short prompt, and the search and three seeds with the long one
    assert hours["both"] == pytest.approx(hours["short"] / 3 + hours["long"] * 4 / 3, abs=0.03)
    assert hours["long"] > 1.1 * hours["short"]
