"""A real Slurm cluster of two nodes on this machine, and words to use it with."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpc_dist.errors import EXIT_USAGE
from tests.conftest import gpc, losses
from tests.processes import TIMEOUT_S, on_ranks

LAB = Path(__file__).parent / "lab"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}


@dataclass(frozen=True)
class SlurmLab:
    """The cluster; its commands work in the environment of the tests."""

    environment: dict[str, str]

    def call(self, *words: object, cwd: Path | None = None) -> str:
        done = subprocess.run(
            [str(word) for word in words], capture_output=True, text=True, cwd=cwd, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *words: object, cwd: Path) -> str:
        return self.call("sbatch", "--parsable", *words, cwd=cwd).strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol` says of a job."""
        shown = self.call("scontrol", "show", "job", "-o", job)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait(self, job: str) -> dict[str, str]:
        """A job's end."""
        return self.wait_for(job, lambda found: found["JobState"] in ENDED)

    def wait_for(self, job: str, ready: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        deadline = time.monotonic() + TIMEOUT_S
        while not ready(found := self.job(job)):
            assert time.monotonic() < deadline, found
            time.sleep(0.2)
        return found

    def down(self, *words: str) -> None:
        subprocess.run([LAB / "down.sh", *words], check=True, timeout=120)

    def up(self) -> None:
        done = subprocess.run([LAB / "up.sh"], stdout=subprocess.PIPE, text=True, check=True, timeout=120)
        shown = Path(done.stdout.strip()).read_text().removeprefix("export ")
        self.environment.update(word.split("=", 1) for word in shlex.split(shown))
        os.environ.update(self.environment)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmLab]:
    if shutil.which("sbatch") is None:
        reason = "needs Slurm: apt-get install --no-install-recommends slurm-wlm munge"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    folder = tempfile.mkdtemp(prefix="slurm.", dir="/tmp")  # Unix sockets want a short path
    before = dict(os.environ)
    os.environ |= {
        "SLURM_LAB_DIR": folder,
        "SLURM_LAB_PORT": str(_free_ports()),
        # what `source activate` does: the batch script finds `gpc-dist` by its name
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    lab = SlurmLab({})
    try:
        lab.up()
        yield lab
    finally:
        lab.down("--purge")
        os.environ.clear()
        os.environ.update(before)


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


def _free_ports() -> int:
    """The first of a hundred ports, of which those at hand are free."""
    for start in range(21000, 29000, 500):
        try:
            for port in (start, start + 102, start + 103):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return start
    raise AssertionError("no free ports")


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


def recorded_once(folder: Path, count: int = 1) -> None:
    """MLflow holds `count` runs beside the folder, finished, with each step of this one once."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'gpc-dist'")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == count
    assert {run.info.status for run in runs} == {"FINISHED"}
    state = json.loads((folder / "tracking.json").read_text())
    history = client.get_metric_history(state["run_id"], "train/loss")
    assert sorted(point.step for point in history) == list(range(1, STEPS + 1))
