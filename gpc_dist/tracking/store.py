"""The tracking store of MLflow: its URI, and clients of it."""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from gpc_dist import locks
from gpc_dist.errors import UserError
from gpc_dist.shown import redact
from gpc_dist.tracking import credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SQLITE = "sqlite:///"
_SERVER = re.compile(r"(https?|databricks|uc)\b")

# MLflow's default (7 retries, 120 s each) would hide a server that is down for minutes; the exporter
# retries by itself, and `gpc-dist sync` should fail at once.
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_HTTP_PATIENCE = {_RETRIES: "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}


def tracking_uri(given: str | None, run_dir: Path | str, last: str | None = None) -> str:
    """The tracking store of a run, with an absolute path if it is a SQLite file.

    It is `given`, or else MLFLOW_TRACKING_URI, or else the server that holds the run already, or else
    `mlflow.db` in the parent of the run folder, so that all runs in that parent share one store. A relative
    SQLite path starts at the working folder.

    Args:
        given: `tracking.uri`.
        last: the store to which the run was exported last, redacted.
    """
    uri = given or os.environ.get(credentials.URI)
    if not uri and last and _SERVER.match(last):
        uri = last.replace("://***@", "://")
    if not uri:
        return f"{_SQLITE}{Path(run_dir).absolute().parent / 'mlflow.db'}"
    if path := _sqlite_path(uri):
        return f"{_SQLITE}{path.absolute()}"
    return uri


def ui_command(uri: str) -> str:
    """The command that shows the store in a browser; for a tracking server, its address."""
    if _SERVER.match(uri):
        return redact(uri)
    return f"mlflow ui --backend-store-uri {shlex.quote(redact(uri))}"


def ui_page(uri: str, address: str) -> str:
    """Like `ui_command`, for one page of the UI.

    Args:
        address: what stands in the page's address after the server's.
    """
    if uri.startswith("http"):
        return f"{redact(uri).rstrip('/')}{address}"
    return ui_command(uri) if _SERVER.match(uri) else f"{ui_command(uri)} and then {_UI}{address}"


_UI = "http://127.0.0.1:5000"
"""Where `mlflow ui` listens."""

# With this tag the UI shows runs and metrics first, not the pages for prompts and agents.
_MODEL_TRAINING = {"mlflow.experimentKind": "custom_model_development"}


def connect(uri: str, experiment: str, runs_dir: Path) -> tuple[MlflowClient, str]:
    """Return a client of the store, and the experiment's id; store and experiment are created on first use.

    Args:
        uri: a result of `tracking_uri`.
        experiment: name of the experiment.
        runs_dir: folder of the run folders; a database other than SQLite keeps its artifacts there.

    Raises:
        UserError: the experiment is deleted, or see `credentials.check_server`.
        mlflow.exceptions.MlflowException: the store cannot be reached or refuses.
    """
    path = _sqlite_path(uri)
    with _creating(path) if path else nullcontext():
        client = _client(uri)
        artifacts = (path.parent if path else runs_dir) / "mlartifacts"
        location = None if _SERVER.match(uri) else artifacts.absolute().as_uri()
        return client, _experiment_id(client, experiment, location)


def open_client(uri: str) -> MlflowClient:
    """Return a client of an existing store, for reading.

    Raises:
        UserError: the SQLite file does not exist, and opening it would create an empty one; or see
            `credentials.check_server`.
    """
    path = _sqlite_path(uri)
    if path and not path.is_file():
        raise UserError(f"there is no tracking store {path}: give the one of the runs with --uri")
    with _creating(path) if path else nullcontext():  # the first use may have to migrate its tables
        return _client(uri)


def same_store(one: str | None, other: str) -> bool:
    """Whether two URIs lead to the same store, whoever asks."""
    return one is not None and _anonymous(one) == _anonymous(other)


def _anonymous(uri: str) -> str:
    return redact(uri).replace("://***@", "://")


def _client(uri: str) -> MlflowClient:
    credentials.check_server(uri)
    for name, value in _HTTP_PATIENCE.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return MlflowClient(uri, registry_uri=uri)


@contextmanager
def sent_once() -> Iterator[None]:
    """MLflow's client does not repeat a request of the block: one that creates something, of which only the answer was
    lost, would create it twice. Whoever tries again looks first for what may be there."""
    usual = os.environ.get(_RETRIES, _HTTP_PATIENCE[_RETRIES])
    os.environ[_RETRIES] = "0"
    try:
        yield
    finally:
        os.environ[_RETRIES] = usual


@contextmanager
def _creating(database: Path) -> Iterator[None]:
    # The first use of a SQLite store creates and migrates its tables, and two at once break it.
    with locks.hold(database.with_name(f".{database.name}.lock")):
        if not database.exists():
            _make_tables(database)
        yield


def _make_tables(database: Path) -> None:
    """Create the store under another name, then rename it: a job that is ended during the creation would leave
    tables that no later run can use or complete."""
    from mlflow import MlflowClient

    new = database.with_name(f".{database.name}.new")
    new.unlink(missing_ok=True)
    new.with_name(f"{new.name}-journal").unlink(missing_ok=True)
    MlflowClient(f"{_SQLITE}{new}").search_experiments(max_results=1)
    new.rename(database)


def _experiment_id(client: MlflowClient, name: str, artifact_location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location, tags=_MODEL_TRAINING))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another run was faster
    assert found is not None
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"experiment '{name}' is deleted in MLflow: restore it with mlflow experiments restore --experiment-id "
            f"{found.experiment_id}, or give another --tracking.experiment"
        )
    return str(found.experiment_id)


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None
