"""Runs and searches without training: folders as a trainer and a driver write them, and the stores they go to."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpc_dist import config, files
from gpc_dist.runs.folder import RunFolder, SearchFolder, State, TrialFolder
from gpc_dist.runs.metrics import MetricLog
from tests.mlflow_server import MlflowServer

from .searches import AddTrial, MakeSearch, decide

MakeRun = Callable[..., RunFolder]
Start = Callable[[RunFolder, str], "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, mlflow_store: Path) -> Path:
    """Folder of run folders, beside which is a store that they share."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copy(mlflow_store, folder / "mlflow.db")
    return folder


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
def trainer(tmp_path: Path) -> Iterator[Start]:
    """Starts a process that runs a script with `run` (RunFolder), `log` (MetricLog), `exporter`."""
    yield from python_processes(
        "import os, signal, sys, time\n"
        "from gpc_dist import files\n"
        "from gpc_dist.runs.folder import RunFolder\n"
        "from gpc_dist.tracking.process import start\n"
        "from gpc_dist.runs.metrics import MetricLog\n"
        "run = RunFolder(sys.argv[1])\n"
        "run.write_status('running')\n"
        "log = MetricLog(run.metrics)\n"
        "exporter = start(run.path)\n",
        tmp_path,
    )


def python_processes(prologue: str, place: Path) -> Iterator[Start]:
    """Starts processes in `place` that run `prologue` and then a script, with a folder's path as their argument; ends
    those that are left."""
    started = []

    def start(folder: RunFolder, script: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", prologue + script, str(folder.path)],
            cwd=place,
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


@pytest.fixture
def make_search(runs: Path, request: pytest.FixtureRequest) -> MakeSearch:
    """Writes what stands in a search's folder before the first trial."""

    def make(**keys: Any) -> SearchFolder:
        search = SearchFolder(runs / request.node.name)
        tree = {
            "name": search.path.name,
            "recipe": "rte",
            "metric": "accuracy",
            "mode": "max",
            "space": {"train.lr": {"loguniform": [1e-4, 1e-2]}, "adapter.cell": {"choice": ["gated"]}},
            "scheduler": {"name": "asha", "grace": 2, "brackets": None},
            "tracking": {"experiment": "searches", "group": "night"},
        }
        files.write_text(search.config, yaml.safe_dump(tree | keys, sort_keys=False))
        files.write_json(search.facts, {**FACTS, "command": "gpc-dist tune rte"})
        search.write_status("running")
        return search

    return make


@pytest.fixture
def add_trial(make_run: MakeRun) -> AddTrial:
    """Writes a trial: `accuracy` by step, how it ended and what the driver made of it."""

    def add(
        search: SearchFolder,
        number: int,
        accuracy: dict[int, float],
        state: State = "finished",
        decision: str = "completed",
        **overrides: str,
    ) -> TrialFolder:
        trial = search.trial(f"t{number}")
        # the trial's own word on the store does not count
        elsewhere = {"tracking__uri": "sqlite:////nowhere/mlflow.db", "tracking__experiment": "other"}
        make_run(trial.path, **elsewhere, **overrides)
        trial.write_status("running")
        with MetricLog(trial.metrics) as log:
            for step, value in accuracy.items():
                log.append(step, {"val/accuracy": value})
        files.write_text(trial.adapter / "adapter_config.json", f"adapter {number}")
        if state == "finished":
            files.write_json(trial.result, {"steps": max(accuracy), "step_ms": 5.0})
        decide(trial, search, number, decision)
        if state != "running":
            trial.write_status(state, "SIGUSR2" if state == "stopped" else "")
        return trial

    return add


@pytest.fixture(scope="session")
def server_uri(tmp_path_factory: pytest.TempPathFactory, mlflow_store: Path) -> Iterator[str]:
    """A real tracking server."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(mlflow_store, folder / "mlflow.db")
    server = MlflowServer(folder)
    yield server.uri
    server.kill()
