"""Adapters that are models of MLflow, by the URIs that MLflow has for them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gpc_dist.errors import MachineError, UserError
from gpc_dist.shown import one_line, redact
from gpc_dist.tracking.credentials import URI
from gpc_dist.tracking.store import open_client

if TYPE_CHECKING:
    from mlflow import MlflowClient

_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(/(?P<version>[^/]+)|@(?P<alias>[^/]+))")
_OF_A_RUN = re.compile(r"runs:/(?P<run>[^/]+)/(?P<model>.+)")
_DATABASES = (Path("runs/mlflow.db"), Path("mlflow.db"))


def is_model_uri(text: str) -> bool:
    return text.startswith(("models:/", "runs:/"))


def model_name(uri: str) -> str:
    """The name of the registered model, or else the id of the model or run."""
    found = _REGISTERED.match(uri) or _OF_A_RUN.fullmatch(uri)
    return next(iter(found.groups())) if found else uri.partition(":/")[2]


def fixed_uri(uri: str) -> str:
    """The URI of the version that `latest` or an alias of a registered model means now; any other URI as it is.

    Raises:
        UserError, MachineError: see `fetch_model`.
    """
    found = _REGISTERED.fullmatch(uri)
    if found is None or not (found["alias"] or found["version"] == "latest"):
        return uri
    with _store(uri) as (client, _):
        if alias := found["alias"]:
            version = client.get_model_version_by_alias(found["name"], alias).version
        else:
            every = client.search_model_versions(f"name = '{found['name']}'")
            if not every:
                raise UserError(f"{uri}: there is no version of a model {found['name']}")
            version = str(max(int(each.version) for each in every))
    return f"models:/{found['name']}/{version}"


def fetch_model(uri: str, folder: Path) -> Path:
    """Fetch a model's files into a folder; returns the folder of the adapter in it.

    Args:
        uri: `models:/<name>/<version>`, `models:/<model id>`, or `runs:/<run id>/<model>`; from the store that
            MLFLOW_TRACKING_URI names, or else from `mlflow.db` in `runs` or here.

    Raises:
        UserError: there is no such store, or the model is no adapter's.
        MachineError: the store does not give it.
    """
    with _store(uri) as (client, store):
        import mlflow.artifacts
        from mlflow.models import Model

        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        location = _location(client, uri)
        files = Path(mlflow.artifacts.download_artifacts(location, dst_path=str(folder), tracking_uri=store))
        if not (files / "MLmodel").is_file():
            raise UserError(f"{uri} is no model: it has no file MLmodel")
        data = Model.load(files).flavors.get("python_function", {}).get("data")
    held = (files / str(data)).resolve()
    if not data or not held.is_dir() or not held.is_relative_to(files.resolve()):
        raise UserError(f"{uri} holds no adapter that gpc-dist logged")
    return held


def _location(client: MlflowClient, uri: str) -> str:
    """Where a model's files are: MLflow would look a name up in its global registry, whatever store it is given."""
    if found := _REGISTERED.fullmatch(uri):
        return str(client.get_model_version_download_uri(found["name"], found["version"]))
    if found := _OF_A_RUN.fullmatch(uri):
        run = client.get_run(found["run"])
        made = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
        named = [model.artifact_location for model in made if model.name == found["model"]]
        return str(named[0] if named else f"{run.info.artifact_uri}/{found['model']}")
    return str(client.get_logged_model(uri.partition(":/")[2]).artifact_location)


@contextmanager
def _store(uri: str) -> Iterator[tuple[MlflowClient, str]]:
    """A client of the store, and its URI; errors of MLflow's are those of this program."""
    store = os.environ.get(URI) or next(
        (f"sqlite:///{file.absolute()}" for file in _DATABASES if file.is_file()), None
    )
    if store is None:
        raise UserError(f"{uri}: there is no mlflow.db in runs or here: give the store with --tracking.uri")
    try:
        yield open_client(store), store
    except UserError:
        raise
    except Exception as error:  # database, HTTP and artifact stores raise errors of their own
        raise MachineError(
            f"MLflow at {redact(store)} does not give {uri}: {redact(one_line(error))}"
        ) from None
