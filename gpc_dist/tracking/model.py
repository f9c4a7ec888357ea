"""The adapter as an MLflow model, for `mlflow models serve` and `mlflow.pyfunc.load_model`.

The model holds the adapter's files and the name of the module that loads them; nothing is pickled,
and that module is not imported here. Where gpc-dist is installed:

    mlflow models serve -m models:/<model_id> --env-manager local
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpc_dist.errors import UserError
from gpc_dist.tracking.store import sent_once

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

SERVING_MODULE = "gpc_dist.inference.serving"
"""Module with `_load_pyfunc(path)`; MLflow calls it with the folder of the adapter's files."""

_VERSIONS = "mlflow.modelVersions"  # tag from which a model's page in MLflow links to its versions
_NEEDED = ("torch", "transformers", "safetensors")
_PREFIX, _FILES = ".model-", "model"
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!_+-]*")


def log_adapter(
    client: MlflowClient,
    model_id: str,
    adapter: Path,
    facts: Mapping[str, Any],
    place: Path,
    loader_module: str = SERVING_MODULE,
) -> None:
    """Upload the adapter's files to an MLflow model that was created empty, and mark it ready.

    A second call has no further effect.

    Args:
        client: client of the store.
        model_id: the model.
        adapter: folder of the adapter.
        facts: the run's facts: package `versions`, and `signature`.
        place: the run's folder, in which the model is made; nobody else does this now.
        loader_module: module that can be imported where the model is loaded.
    """
    import mlflow.pyfunc
    from mlflow.models import Model

    created = client.get_logged_model(model_id)
    description = Model(
        run_id=created.source_run_id,
        artifact_path=created.artifact_location,
        model_uuid=model_id,
        model_id=model_id,
    )
    with _folder_in(place) as files, warnings.catch_warnings():
        # no example is given, because it would be a row of the user's data
        warnings.filterwarnings("ignore", message=".*input example was not provided")
        mlflow.pyfunc.save_model(
            files,
            loader_module=loader_module,
            data_path=str(adapter),
            mlflow_model=description,
            signature=signature(facts.get("signature", {})),
            pip_requirements=pip_requirements(facts.get("versions", {})),
        )
        client.log_model_artifacts(model_id, str(files))
    client.finalize_logged_model(model_id, "READY")


@contextmanager
def _folder_in(place: Path) -> Iterator[Path]:
    """A new folder while the block runs; those of exporters that were killed are removed."""
    for left in place.glob(f"{_PREFIX}*"):
        # what holds anything else is somebody's
        if left.is_dir() and not left.is_symlink() and {path.name for path in left.iterdir()} <= {_FILES}:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=place) as folder:
        yield Path(folder) / _FILES


def register(client: MlflowClient, name: str, model_id: str, tags: Mapping[str, str]) -> str:
    """Make a model the newest version of a registered model, unless it is one of its versions already.

    Args:
        client: client of the store.
        name: name of the registered model, which is created on first use.
        model_id: a model that is ready.
        tags: tags of the version; the tag `model_id` is added.

    Returns:
        The version: load it from `models:/<name>/<version>`.
    """
    from mlflow.exceptions import MlflowException

    registered = client.get_logged_model(model_id)
    made_before = client.search_model_versions(f"run_id = '{registered.source_run_id}'")
    for found in made_before:
        if found.name == name and found.tags.get("model_id") == model_id:
            return str(found.version)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    with sent_once():
        version = client.create_model_version(
            name,
            # not models:/<model_id>, which MLflow would look up in its global store instead of this one
            registered.artifact_location,
            run_id=registered.source_run_id,
            model_id=model_id,
            tags={**tags, "model_id": model_id},
        ).version
    links = json.loads(registered.tags.get(_VERSIONS, "[]")) + [{"name": name, "version": version}]
    client.set_logged_model_tags(model_id, {_VERSIONS: json.dumps(links)})
    return str(version)


def signature(described: Mapping[str, Mapping[str, str]]) -> ModelSignature | None:
    """The columns that MLflow checks in a request; None for no columns, so that only the loader checks.

    A signature is never guessed: if it lacks a column that the task reads, MLflow drops that column
    from requests without a message.

    Args:
        described: `{"inputs": {"premise": "string", ...}, "outputs": {"prediction": "string"}}`,
            types as MLflow names them; `outputs` may be left out.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    def schema(columns: Mapping[str, str]) -> Schema | None:
        return Schema([ColSpec(type_, name) for name, type_ in columns.items()]) if columns else None

    inputs = schema(described.get("inputs", {}))
    return ModelSignature(inputs, schema(described.get("outputs", {}))) if inputs else None


def pip_requirements(versions: Mapping[str, str]) -> list[str]:
    """The packages for serving, at the versions of the run; local parts such as `+cu128` are dropped,
    because package indexes lack them.

    Raises:
        UserError: a version is none; a line of requirements could be anything.
    """
    import mlflow

    import gpc_dist

    for name, version in versions.items():
        if not isinstance(version, str) or not _VERSION.fullmatch(version):
            raise UserError(
                f"facts.json: the version {version!r} of {name} is none: restore or remove the file"
            )
    pinned = [f"{name}=={versions[name].split('+')[0]}" for name in _NEEDED if name in versions]
    return [f"gpc-dist=={gpc_dist.__version__}", f"mlflow=={mlflow.__version__}", *pinned]


def digest(adapter: Path) -> str:
    """SHA-256 over the names and contents of the adapter's files."""
    total = hashlib.sha256()
    for path in sorted(p for p in adapter.rglob("*") if p.is_file()):
        total.update(path.relative_to(adapter).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
