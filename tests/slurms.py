"""A real Slurm cluster of two nodes on this machine, words to use it with, and what must hold of a job's record."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.processes import TIMEOUT_S

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "slurm" / "train.sbatch"
LAB = Path(__file__).parent / "cluster" / "lab"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}


@dataclass(frozen=True)
class SlurmLab:
    """The cluster; its commands work in the environment of the tests."""

    environment: dict[str, str]

    def call(self, *words: object, cwd: Path | None = None, **environment: str) -> str:
        done = subprocess.run(
            [str(word) for word in words],
            capture_output=True,
            text=True,
            cwd=cwd,
            env=os.environ | environment,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *words: object, cwd: Path, **environment: str) -> str:
        """Submit a job, which gets these environment variables too; returns its id."""
        return self.call("sbatch", "--parsable", *words, cwd=cwd, **environment).strip()

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

    def daemon(self, name: str) -> int:
        """Process id of slurmctld, or of the slurmd of a node."""
        return int(Path(self.environment["SLURM_LAB_DIR"], "run", f"{name}.pid").read_text().split()[0])

    def is_of(self, process: psutil.Process, job: str) -> bool:
        """Whether this is a process of a job of this cluster, or Slurm's own for it on a node."""
        if process.name() == "slurmstepd":
            nodes = list(Path(self.environment["SLURM_LAB_DIR"], "etc").glob("hosts.*"))
            here = Path(f"/proc/{process.pid}/root/etc/hosts")
            title = " ".join(process.cmdline())
            return f"[{job}." in title and (not nodes or any(here.samefile(node) for node in nodes))
        found = process.environ()
        mine = found.get("SLURM_CONF") == self.environment["SLURM_CONF"]
        return mine and found.get("SLURM_JOB_ID") == job

    def down(self, *words: str) -> None:
        subprocess.run([LAB / "down.sh", *words], check=True, timeout=120)

    def up(self) -> None:
        done = subprocess.run([LAB / "up.sh"], stdout=subprocess.PIPE, text=True, check=True, timeout=120)
        shown = Path(done.stdout.strip()).read_text().removeprefix("export ")
        self.environment.update(word.split("=", 1) for word in shlex.split(shown))
        os.environ.update(self.environment)


@contextmanager
def slurm_lab() -> Iterator[SlurmLab]:
    """The cluster, for as long as the block runs."""
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


def _free_ports() -> int:
    """The first of a hundred ports, of which those at hand are free; above those of jobs (`slurm/job.sh`)."""
    for start in range(32000, 32700, 100):
        try:
            for port in (start, start + 102, start + 103):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return start
    raise AssertionError("no free ports")


def log_of(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.glob("*.log"))


def recorded_once(folder: Path, steps: int, count: int = 1) -> None:
    """MLflow holds `count` runs beside the folder, finished, with each of the steps of this one once."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'gpc-dist'")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == count
    assert {run.info.status for run in runs} == {"FINISHED"}
    state = json.loads((folder / "tracking.json").read_text())
    history = client.get_metric_history(state["run_id"], "train/loss")
    assert sorted(point.step for point in history) == list(range(1, steps + 1))
