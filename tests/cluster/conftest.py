"""What the tests of jobs share: a run that is long enough to be disturbed, and what must hold of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gpc_dist.errors import EXIT_USAGE
from tests.conftest import gpc, losses
from tests.processes import TIMEOUT_S, on_ranks
from tests.slurms import SlurmLab

Refuse = Callable[[str, Sequence[str], str], None]


@pytest.fixture
def refuse(
    slurm: SlurmLab, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refuse:
    """Asserts that `gpc-dist submit WHAT WORDS` is refused with these words, and leaves neither a job nor a file."""
    monkeypatch.chdir(tmp_path)

    def assert_refused(what: str, words: Sequence[str], said: str) -> None:
        queue = ("squeue", "--noheader", "--states=all", "--format=%i")
        before = slurm.call(*queue)
        assert gpc("submit", what, *words) == EXIT_USAGE
        assert said in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
        assert slurm.call(*queue) == before

    return assert_refused


def job_of(said: str) -> str:
    found = re.search(r"^job (\d+)", said, re.MULTILINE)
    assert found, said
    return found[1]


STEPS = 60
HELD = 35
"""Step at which a run is held to be disturbed: between two checkpoints."""


@pytest.fixture(scope="session")
def long_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Path:
    """The tiny recipe with more steps, recorded in MLflow, with no checkpoint but at its evaluations."""
    text = tiny_recipe.read_text()
    text = text.replace("steps: 12", f"steps: {STEPS}").replace("eval_every: 4", "eval_every: 20")
    text = text.replace("enabled: false", f"enabled: true, finish_timeout_s: {TIMEOUT_S}")
    text = text.replace("ranks: 1", "ranks: 2")
    path = tmp_path_factory.mktemp("long") / "long.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, long_recipe: Path) -> Path:
    """The folder of that run, made by two ranks without Slurm."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = on_ranks(2, "train", long_recipe, "--run.dir", folder / "run", "--tracking.enabled", "false")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def same_run(folder: Path, other: Path) -> None:
    """The same adapter bit for bit, and every step once with the same loss."""
    names = ("adapter.safetensors", "adapter_config.json")
    for name in names:
        assert (folder / "adapter" / name).read_bytes() == (other / "adapter" / name).read_bytes()
    assert losses(folder) == losses(other)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == list(range(1, len(steps) + 1))
