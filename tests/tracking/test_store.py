"""Where runs go, and the first use of a store by several runs at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mlflow import MlflowClient

from gpc_dist.errors import UserError
from gpc_dist.runs.folder import RunFolder
from gpc_dist.tracking.state import ExportState
from gpc_dist.tracking.store import tracking_uri, ui_command, ui_page
from gpc_dist.tracking.sync import sync_run
from tests.processes import start_call

from .conftest import MakeRun


@pytest.mark.parametrize(
    ("configured", "expected"),
    [
        (None, "sqlite:////home/user/runs/mlflow.db"),
        ("sqlite:///other.db", "sqlite:////here/other.db"),
        ("sqlite:////abs/other.db", "sqlite:////abs/other.db"),
        ("https://mlflow.example.org", "https://mlflow.example.org"),
    ],
)
def test_tracking_uri(configured: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getcwd", lambda: "/here")
    assert tracking_uri(configured, "/home/user/runs/rte") == expected


def test_ui_command() -> None:
    assert ui_command("sqlite:////r/mlflow.db") == ("mlflow ui --backend-store-uri sqlite:////r/mlflow.db")
    assert ui_command("https://u:p@mlflow.org") == "https://***@mlflow.org"


def test_ui_page() -> None:
    command = "mlflow ui --backend-store-uri sqlite:////r/mlflow.db"
    assert ui_page("sqlite:////r/mlflow.db", "/#/e/1") == f"{command} and then http://127.0.0.1:5000/#/e/1"
    assert ui_page("https://u:p@mlflow.org/", "/#/e/1") == "https://***@mlflow.org/#/e/1"
    assert ui_page("databricks", "/#/e/1") == "databricks"  # whose address only its users know


@pytest.mark.slow
def test_three_runs_share_the_first_use_of_a_store(tmp_path: Path, make_run: MakeRun) -> None:
    folders = [make_run(tmp_path / "runs" / f"seed{seed}") for seed in range(3)]
    for folder in folders:
        folder.write_status("finished")
    started = [start_call(sync_run, folder.path) for folder in folders]
    assert [each.wait() for each in started] == [0] * 3
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("gpc-dist")
    assert experiment is not None
    assert experiment.artifact_location == f"file://{tmp_path}/runs/mlartifacts"
    found = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in found) == [f"seed{seed}" for seed in range(3)]


@pytest.mark.parametrize(
    "content",
    ["\0" * 200, "{", "[]", '{"steps": 3}', '{"run_id": {"a": 1}}', '{"run_id": "a", "run_id": "b"}'],
)
def test_a_state_that_cannot_be_read_is_an_error_and_to_watchers_only_news(
    tmp_path: Path, content: str
) -> None:
    run = RunFolder(tmp_path)
    run.tracking.write_text(content)
    with pytest.raises(UserError, match=r"tracking\.json.* restore or remove it"):
        ExportState.load(run)
    found = ExportState.peek(run)
    assert (found.run_id, found.complete) == (None, False)
    assert "restore or remove it" in str(found.error)
    run.tracking.unlink()
    run.tracking.mkdir()
    assert "directory" in str(ExportState.peek(run).error)


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = ExportState("uri", "key", "1", "2", "finished", {"a": 1}, {"b": "c"}, "m", "why")
    written.save(RunFolder(tmp_path))
    assert ExportState.load(RunFolder(tmp_path)) == written
