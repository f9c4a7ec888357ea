"""What is recorded about the machine, and what is not."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
from pathlib import Path

import mlflow
import psutil
import pytest

import gpc_dist
from gpc_dist.runs.facts import collect_facts


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_facts_are_json_and_complete() -> None:
    facts = collect_facts()
    json.dumps(facts, allow_nan=False)
    assert {"command", "cpu", "versions"} <= facts.keys()
    assert (facts["host"], facts["folder"]) == (socket.gethostname(), os.getcwd())
    assert (facts["python"], facts["cpus"]) == (platform.python_version(), psutil.cpu_count())
    assert facts["memory_gib"] == pytest.approx(psutil.virtual_memory().total / 2**30, abs=0.06)
    versions = facts["versions"]
    assert (versions["gpc-dist"], versions["mlflow"]) == (gpc_dist.__version__, mlflow.__version__)
    assert {"torch", "deepspeed", "transformers", "datasets", "ray"} <= versions.keys()


def test_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    argv = ["/opt/bin/gpc-dist", "train", "rte", "--tracking.uri", "https://me:hunter3@mlflow/x"]
    facts = collect_facts(argv)
    assert facts["command"] == "gpc-dist train rte --tracking.uri https://***@mlflow/x"
    assert "hunter" not in json.dumps(facts)


def test_commit_and_local_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "git_commit" not in collect_facts()
    (tmp_path / "code").write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "code")
    git(tmp_path, "commit", "-q", "-m", "first")
    facts = collect_facts()
    assert (facts["git_commit"], facts["git_dirty"]) == (git(tmp_path, "rev-parse", "HEAD"), False)
    (tmp_path / "code").write_text("2")
    assert collect_facts()["git_dirty"] is True


def test_machine_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    assert "git_commit" in collect_facts()
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "git_commit" not in collect_facts()
