"""Runs without training: folders written as a trainer writes them, and the stores they go to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpc_dist import config, files
from gpc_dist.tracking.folder import RunFolder

# before anything imports mlflow, here and in the processes that tests start
os.environ |= {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # servers that are down here stay so
}

REPOSITORY = Path(__file__).parents[2]

MakeRun = Callable[..., RunFolder]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of run folders, so that tests share one SQLite store and its slow first use."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def make_run(runs: Path, request: pytest.FixtureRequest) -> MakeRun:
    """Writes what stands in a run folder before the first step."""

    def make(folder: Path | None = None, **overrides: str) -> RunFolder:
        run = RunFolder(folder or runs / request.node.name)
        keys = {name.replace("__", "."): value for name, value in overrides.items()}
        tree = config.build({}, {"run.name": run.path.name, "task.name": "rte"} | keys)
        files.write_text(run.config, tree.to_yaml())
        files.write_json(run.ds_config, {"zero_optimization": {"stage": 0}})
        files.write_json(run.facts, FACTS)
        return run

    return make


FACTS = {
    "command": "gpc-dist train rte",
    "host": "node7",
    "cpus": 16,
    "git_commit": "c0ffee",
    "git_dirty": True,
    "versions": {"torch": "2.13.0+cpu", "gpc-dist": "0.1.0"},
    "dataset": {
        "name": "rte",
        "source": "/data/rte",
        "digest": "5" * 64,
        "train_examples": 2490,
        "validation_examples": 277,
    },
    "signature": {
        "inputs": {"premise": "string", "hypothesis": "string"},
        "outputs": {"label": "string"},
    },
}


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Callable[[RunFolder, str], subprocess.Popen[str]]]:
    """Starts a process that runs a script with `run` (RunFolder), `log` (MetricLog), `follower`.

    Its working folder is `tmp_path`; its group of processes is its own, so that a test can send a
    signal to it as a batch system does.
    """
    started = []

    def start(run: RunFolder, script: str) -> subprocess.Popen[str]:
        prologue = (
            "import os, signal, sys, time\n"
            "from gpc_dist import files\n"
            "from gpc_dist.tracking.folder import RunFolder\n"
            "from gpc_dist.tracking.follower import start\n"
            "from gpc_dist.tracking.metrics import MetricLog\n"
            "run = RunFolder(sys.argv[1])\n"
            "run.write_status('running')\n"
            "log = MetricLog(run.metrics)\n"
            "follower = start(run.path)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", prologue + script, str(run)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="session")
def server_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real tracking server."""
    folder = tmp_path_factory.mktemp("server")
    uri = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", uri.rsplit(":", 1)[1]]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "log").open("wb") as output:
        server = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_until(lambda: _answers(f"{uri}/health"), timeout_s=180)  # machines that run tests are busy
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # with its workers, and without their long farewell
        server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], object], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False
