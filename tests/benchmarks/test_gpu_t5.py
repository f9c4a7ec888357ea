"""The GPU benchmark's CPU twin: every kind of side runs, on the same examples, and ends up in the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_t5.py"


@pytest.mark.slow
def test_the_cpu_twin_compares_all_sides(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    sides = ["ours-gpc", "peft", "peft-deepspeed-2"]
    command = [sys.executable, str(SCRIPT), "--cpu", "--lengths", "mix", "--max-length", "12"]
    command += ["--batch-size", "2", "--prompt-tokens", "4", "--out", str(out), "--sides", *sides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    (result,) = found["results"]
    assert list(result["sides"]) == sides
    for (run,) in result["sides"].values():
        assert "failed" not in run, run
        assert run["steps"] == 2
        assert run["tokens_per_s"] > 0
        assert not run["recompute"]
    # the same rows, so the same tokens for each example on all sides
    tokens = [run["tokens_per_s"] / run["examples_per_s"] for (run,) in result["sides"].values()]
    assert tokens == pytest.approx([tokens[0]] * 3)
    assert 4 <= round(tokens[0], 6) <= 12  # a quotient of two speeds
    table = done.stdout[done.stdout.index("tokens/s  ") :]
    assert all(side in table for side in sides)
