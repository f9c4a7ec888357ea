"""An adapter that MLflow has is found by every URI that MLflow has for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gpc_dist.adapter.store import NAMES
from gpc_dist.errors import UserError
from gpc_dist.tracking.fetch_model import fetch_model, fixed_uri, model_name
from gpc_dist.tracking.model import log_adapter, register


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """What stands for an adapter: MLflow does not look into it."""
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / name).write_text(name)
    return folder


def test_models_are_fetched_by_version_alias_id_and_run(
    adapter: Path, tmp_path: Path, mlflow_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    # not where MLflow itself would look
    (tmp_path / "runs").mkdir()
    shutil.copy(mlflow_store, tmp_path / "runs" / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    client = MlflowClient(store, registry_uri=store)
    experiment = client.create_experiment("fetched", (tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment).info.run_id
    model = client.create_logged_model(experiment, name="adapter", source_run_id=run).model_id
    log_adapter(client, model, adapter, {}, adapter.parent)
    assert register(client, "cats", model, {}) == "1"
    client.set_registered_model_alias("cats", "best", "1")

    uris = {
        "models:/cats/1": ("cats", "models:/cats/1"),
        "models:/cats/latest": ("cats", "models:/cats/1"),
        "models:/cats@best": ("cats", "models:/cats/1"),
        f"models:/{model}": (model, f"models:/{model}"),
        f"runs:/{run}/adapter": (run, f"runs:/{run}/adapter"),
    }
    for number, (uri, (name, fixed)) in enumerate(uris.items()):
        assert (model_name(uri), fixed_uri(uri)) == (name, fixed)
        found = fetch_model(fixed, tmp_path / str(number))
        assert {path.name for path in found.iterdir()} == set(NAMES)

    for uri in ("models:/cats/7", "models:/dogs/latest", "models:/cats@worst", "runs:/none/adapter"):
        with pytest.raises(UserError, match=uri.partition(":/")[2].partition("/")[0].partition("@")[0]):
            fetch_model(fixed_uri(uri), tmp_path / "missing")
