"""A run as MLflow sees it: trained, recorded, and its adapter loaded again as a model for plain text."""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from gpc_dist import cli
from gpc_dist.runs.folder import RunFolder
from gpc_dist.tracking.state import ExportState
from tests.holds import Hold
from tests.processes import TIMEOUT_S, start_launcher, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path, mlflow_store: Path) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "run"
    shutil.copy(mlflow_store, folder.parent / "mlflow.db")
    hold = Hold(folder, 11)
    recorded = ("--tracking.enabled", "true", "--tracking.finish_timeout_s", TIMEOUT_S)
    launcher = start_launcher("train", tiny_recipe, "--run.dir", folder, *recorded, "--engine.ranks", 2)
    hold.wait(lambda: launcher.stderr)
    wait_until(lambda: ExportState.load(RunFolder(folder)).run_id)  # for which its end would not wait long
    hold.release()
    assert launcher.wait() == 0, launcher.stderr
    return folder


@pytest.fixture(scope="module")
def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def test_the_run_is_finished_with_its_figures(run: Path, result: dict[str, Any]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    recorded = client.get_run(str(result["mlflow_run_id"]))
    assert recorded.info.status == "FINISHED"
    assert recorded.info.run_name == "tiny"
    assert recorded.data.params["adapter.method"] == "gpc"
    assert recorded.data.tags["version.torch"] == metadata.version("torch")
    history = client.get_metric_history(recorded.info.run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, 13))
    assert recorded.data.metrics["final/per_class/with/f1"] == result["per_class"]["with"]["f1"]
    assert "confusion_matrix.png" in {file.path for file in client.list_artifacts(recorded.info.run_id)}
    (dataset,) = recorded.inputs.dataset_inputs
    assert dataset.dataset.name == "cats"


def test_the_model_answers_plain_text_as_the_program_does(
    run: Path, result: dict[str, Any], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    uri = f"sqlite:///{run.parent}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    outputs = mlflow.MlflowClient(uri).get_run(str(result["mlflow_run_id"])).outputs
    loaded = mlflow.pyfunc.load_model(f"models:/{outputs.model_outputs[0].model_id}")
    texts = [json.loads(line)["text"] for line in (tiny_data / "validation.jsonl").open()]
    answers = loaded.predict(pd.DataFrame({"text": texts}))
    output = tmp_path / "predictions.jsonl"
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["--input", str(source), "--output", str(output), "--engine.ranks", "1"]
    assert cli.main(["predict", str(run / "adapter"), *words]) == 0
    expected = [json.loads(line) for line in output.open()]
    assert list(answers["prediction"]) == [row["prediction"] for row in expected]
    assert list(answers["probability_with"]) == pytest.approx(
        [row["probabilities"]["with"] for row in expected]
    )


def test_a_missing_column_is_named(run: Path) -> None:
    from gpc_dist.errors import UserError
    from gpc_dist.inference.serving import _load_pyfunc

    model = _load_pyfunc(str(run / "adapter"))
    with pytest.raises(UserError, match="lacks the column"):
        model.predict(pd.DataFrame({"title": ["a"], "body": ["b"]}))
    assert list(model.predict(["the cat runs"]).columns) == [
        "prediction",
        "probability_with",
        "probability_without",
    ]
