"""What arrives where a part of MLflow is missing: its artifact store, its models, an experiment, its address."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from gpc_dist import files
from gpc_dist.errors import UserError
from gpc_dist.runs.folder import RunFolder
from gpc_dist.runs.metrics import MetricLog
from gpc_dist.tracking.credentials import named_by_user
from gpc_dist.tracking.exporter import ArtifactError
from gpc_dist.tracking.run_exporter import RunExporter
from gpc_dist.tracking.search_exporter import SearchExporter
from gpc_dist.tracking.store import tracking_uri
from gpc_dist.tracking.sync import sync
from tests.processes import wait_until
from tests.proxy import Decision, standing_before

from .conftest import MakeRun
from .searches import AddTrial, MakeSearch, children_of, parent_of
from .test_run_exporter import recorded, run_id_of, store_of


def finished(run: RunFolder) -> RunFolder:
    run.write_status("running")
    with MetricLog(run.metrics) as log:
        log.append(10, {"train/loss": 0.5})
    files.write_text(run.adapter / "adapter_config.json", "{}")
    files.write_json(run.result, {"steps": 10, "step_ms": 5.0})
    run.write_status("finished")
    return run


@pytest.fixture
def blocked(tmp_path: Path) -> Path:
    """A file in the place of an artifact store's folder."""
    file = tmp_path / "artifacts"
    file.write_text("")
    return file


@pytest.mark.slow
def test_without_its_artifact_store_a_run_has_all_but_files(
    make_run: MakeRun, blocked: Path, request: pytest.FixtureRequest
) -> None:
    run = finished(make_run(tracking__experiment=request.node.name))
    MlflowClient(store_of(run)).create_experiment(
        request.node.name, artifact_location=(blocked / "here").as_uri()
    )
    exporter = RunExporter(run)
    with pytest.raises(
        ArtifactError, match="^the artifact store does not take files: .*Not a directory"
    ) as caught:
        exporter.update()
    assert "\n" not in str(caught.value)
    found = recorded(run)
    assert found.info.status == "FINISHED"
    assert found.data.params["adapter.method"] == "gpc"
    assert found.data.metrics["train/loss"] == 0.5
    assert found.data.metrics["final/step_ms"] == 5.0
    assert found.data.tags["host"] == "node7"

    # the store is not asked again at once, and gets everything later
    blocked.unlink()
    with pytest.raises(ArtifactError):
        exporter.update()
    assert not blocked.exists()
    state = RunExporter(run).update()
    listed = {item.path for item in MlflowClient(store_of(run)).list_artifacts(run_id_of(run))}
    assert listed == {"config.yaml", "ds_config.json", "facts.json", "result.json"}
    assert MlflowClient(store_of(run)).get_logged_model(str(state.model_id)).status == "READY"


def test_without_its_artifact_store_a_search_has_all_but_files(
    make_search: MakeSearch, add_trial: AddTrial, blocked: Path, request: pytest.FixtureRequest
) -> None:
    name = request.node.name
    search = make_search(tracking={"experiment": name})
    uri = f"sqlite:///{search.path.parent}/mlflow.db"
    MlflowClient(uri).create_experiment(name, artifact_location=(blocked / "here").as_uri())
    for number in range(3):
        add_trial(search, number, {1: 0.5 + number / 10})
    files.write_json(search.result, {"metric": "accuracy", "mode": "max", "best": 0.7, "best_trial": "t2"})
    search.write_status("finished")
    with pytest.raises(ArtifactError):
        SearchExporter(search).update()
    assert parent_of(search).info.status == "FINISHED"
    children = children_of(search)
    assert [children[f"t{number}"].info.status for number in range(3)] == ["FINISHED"] * 3
    assert [children[f"t{number}"].data.metrics["final/best"] for number in range(3)] == [0.5, 0.6, 0.7]
    blocked.unlink()
    SearchExporter(search).update()
    assert parent_of(search).data.tags["registered_model"] == f"models:/{name}/1"


@pytest.mark.slow
def test_what_was_created_is_not_created_again_where_the_answer_is_lost(
    make_run: MakeRun, server_uri: str
) -> None:
    lost: list[str] = []

    def decide(request: BaseHTTPRequestHandler) -> Decision:
        path, creates = request.path, ("/experiments/create", "/runs/create", "/mlflow/logged-models")
        if request.command != "POST" or not path.endswith(creates) or path in lost:
            return "pass"
        lost.append(path)
        return "lose"

    with standing_before(server_uri, decide) as uri:
        run = finished(make_run(tracking__uri=uri, tracking__experiment="answers are lost"))
        exporter = RunExporter(run)
        wait_until(lambda: updated(exporter))
    assert len(lost) == 3
    client = MlflowClient(server_uri)
    experiment = client.get_experiment_by_name("answers are lost")
    assert experiment is not None
    places = [experiment.experiment_id]
    assert [found.info.run_id for found in client.search_runs(places)] == [exporter.run_id]
    assert [found.model_id for found in client.search_logged_models(places)] == [exporter.state.model_id]


def updated(exporter: RunExporter) -> bool:
    """Whether an attempt succeeded."""
    try:
        return exporter.update().complete
    except MlflowException:
        return False


def test_a_deleted_experiment_is_named_with_its_remedy(
    make_run: MakeRun, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = finished(make_run(tracking__experiment=request.node.name))
    client = MlflowClient(store_of(run))
    number = client.create_experiment(request.node.name, (tmp_path / "artifacts").as_uri())
    client.delete_experiment(number)
    with pytest.raises(
        UserError,
        match=f"experiment '{request.node.name}' is deleted in MLflow: restore it with mlflow experiments restore "
        f"--experiment-id {number}, or give another --tracking.experiment",
    ):
        sync(run.path)
    client.restore_experiment(number)
    assert sync(run.path).complete


def test_sync_waits_for_the_exporter_of_a_run_that_has_ended(make_run: MakeRun) -> None:
    run = finished(make_run())
    done: list[Any] = []
    waiting = threading.Thread(target=lambda: done.append(sync(run.path)))
    with run.hold_tracking():
        waiting.start()
        run.write_status("finished")
    waiting.join()
    assert done[0].complete


# -- where MLflow is ---------------------------------------------------------------------------------------


def test_the_variable_of_mlflow_names_the_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    beside = f"sqlite:///{tmp_path}/mlflow.db"
    run, server = tmp_path / "run", "http://mlflow:5000"
    assert tracking_uri(None, run) == beside
    assert tracking_uri(None, run, last=server) == server
    assert tracking_uri(None, run, last="sqlite:////old/place/mlflow.db") == beside
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracking")
    assert tracking_uri(None, run, last=server) == "https://tracking"
    assert tracking_uri(server, run) == server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert tracking_uri(None, run) == beside


@pytest.fixture
def old_server(server_uri: str) -> Iterator[str]:
    """The real server behind one that wants a password and knows no models, as MLflow 2."""

    def decide(request: BaseHTTPRequestHandler) -> Decision:
        if request.headers.get("Authorization") != f"Basic {base64.b64encode(b'ada:secret').decode()}":
            return 401
        return 404 if "/logged-models" in request.path else "pass"

    with standing_before(server_uri, decide) as uri:
        yield uri


@pytest.mark.slow
def test_a_server_without_models_keeps_the_adapter_as_artifacts(
    make_run: MakeRun, old_server: str, server_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by MLflow's variable, entered with MLflow's variables."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", old_server)
    run = finished(make_run())
    with pytest.raises(Exception, match="401"):
        sync(run.path)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    state = sync(run.path)
    assert (state.complete, state.model_id, state.uri) == (True, None, old_server)
    client = MlflowClient(server_uri)  # whose own client would ask for models
    found = client.get_run(run_id_of(run))
    assert (found.info.status, found.data.metrics["final/step_ms"]) == ("FINISHED", 5.0)
    listed = {item.path for item in client.list_artifacts(found.info.run_id, "adapter")}
    assert listed == {"adapter/adapter_config.json"}
    assert "secret" not in "".join(path.read_text() for path in run.path.rglob("*.json"))
    # in a shell without the variable, the run's folder alone says who gets the password
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(UserError, match="is named by a file alone"):
        sync(run.path)
    with named_by_user(old_server):
        assert sync(run.path).run_id == state.run_id
