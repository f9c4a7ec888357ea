"""The GPU benchmark's CPU twin: every kind of side runs, on the same examples, and ends up in the table."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import Started, command, free_port

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

Run = Callable[[list[str], dict[str, str]], None]


def fork_some(from_nothing: Run) -> Run:
    """As `sides._run`; but only the peer in plain PyTorch is started from nothing, and the others are forked."""

    def run(words: list[str], environment: dict[str, str]) -> None:
        if "gpc_dist" in words:
            done = command(*words[words.index("gpc_dist") + 1 :], **environment)
        elif "--stage" in words:
            rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
            rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            script = words.index(str(BENCHMARKS / "peer_t5.py"))
            done = Started(run_script, words[script:], None, environment | rank)
            done.wait()
        else:
            return from_nothing(words, environment)
        assert done.returncode == 0, done.stderr

    return run


def run_script(*words: str) -> None:
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")


@pytest.mark.slow
def test_the_cpu_twin_compares_all_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_t5
    import sides as each_side

    monkeypatch.setattr(each_side, "_run", fork_some(each_side._run))
    out = tmp_path / "found.json"
    sides = ["ours-gpc", "peft", "peft-deepspeed-2"]
    words = ["--cpu", "--lengths", "mix", "--max-length", "12", "--batch-size", "2", "--prompt-tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["gpu_t5.py", *words, "--out", str(out), "--sides", *sides])
    gpu_t5.main()
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
    said = capsys.readouterr().out
    table = said[said.index("tokens/s  ") :]
    assert all(side in table for side in sides)
