"""Exports a folder to an MLflow run: the base class of the exporters of runs, trials and searches.

`Exporter.update` sends what MLflow does not hold yet. The holder of the folder's tracking lock may
call it at any time and any number of times. Subclasses define what the files of the folder become
in MLflow; all folders have a status, and facts that become tags, description and data set.

A metric is sent once per step. MLflow cannot delete a value: if a resumed run writes steps again
that MLflow already holds, the first values stay. A crash after a request, before `tracking.json` is
written, repeats the request without effect: each value has the time of its line, and MLflow's
stores ignore a metric that they already hold with the same step, time and value.

Artifacts may be kept elsewhere than the rest (a bucket, a folder of the server). They are sent after it, and a
store that does not take them holds up nothing else.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpc_dist import files
from gpc_dist.config import TrackingConfig
from gpc_dist.errors import UserError
from gpc_dist.names import inside
from gpc_dist.runs.folder import RunFolder, State, Status
from gpc_dist.shown import redact
from gpc_dist.tracking import store, translate
from gpc_dist.tracking.state import ExportState

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

# limits of MLflow's API
_METRICS_PER_CALL = 1000
_PER_CALL = 100  # params, and tags

_MLFLOW_STATUS = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "failed": "FAILED",
    "killed": "KILLED",
    "stopped": "KILLED",  # MLflow has no state for a run that can resume; the tag `gpc.state` has it
}


_OUTAGE_S = 20.0


class ArtifactError(Exception):
    """MLflow has everything but artifacts, which its artifact store did not take."""


@dataclass
class Outage:
    """The last failure of the artifact store, which is not asked again for a while: each attempt may take long."""

    error: Exception | None = None
    until_s: float = 0.0
    """By the monotonic clock."""


class Exporter(ABC):
    """Brings one MLflow run up to date with a folder.

    Args:
        folder: a folder with at least its configuration.
        uri: tracking store; the configuration's when not given.

    Raises:
        UserError: the folder has no configuration.
    """

    def __init__(self, folder: RunFolder, uri: str | None = None) -> None:
        self._folder = folder
        self._config = folder.read_config()
        section = self._config.get("tracking") or {}
        self._experiment = section.get("experiment") or TrackingConfig().experiment
        configured = section.get("uri")
        if not isinstance(configured, str | None):
            raise UserError(f"{folder.config}: tracking.uri {configured!r} is no text: correct it")
        self.state = ExportState.load(folder)
        self.uri = store.tracking_uri(uri or configured, folder.path, self.state.uri)
        if not store.same_store(self.state.uri, self.uri):  # not exported yet, or to another store
            self.state = ExportState(uri=redact(self.uri))
        self.outage = Outage()
        self._client: MlflowClient | None = None
        self._files: dict[str, Path] = {}  # artifacts by name

    def update(self) -> ExportState:
        """Send what is new. After an exception, call it again.

        Raises:
            UserError: a file of the folder is broken, or leads elsewhere.
            ArtifactError: artifacts were not taken; everything else was sent.
            mlflow.exceptions.MlflowException: the store cannot be reached or refuses.
        """
        # Read before the other files: an end state means that they are complete.
        version = files.version(self._folder.status)
        status = self._folder.read_status()
        if self._client is None:
            self._client = self._open(status)
        self._send_content(status)
        failure = self._try_artifacts(status)
        self._send_status(status, version)
        if failure is not None:
            reason = next(iter(str(failure).splitlines()), type(failure).__name__)
            raise ArtifactError(f"the artifact store does not take files: {reason}") from failure
        return self.state

    # -- for subclasses to fill in ---------------------------------------------------------------

    @abstractmethod
    def _send_content(self, status: Status) -> None:
        """Send everything but artifacts and the status, which are sent afterwards."""

    def _run_name(self) -> str:
        return self._folder.path.name

    def _first_tags(self) -> dict[str, str]:
        """Tags with which the run is created."""
        return {}

    def _mlflow_status(self, state: State) -> str:
        """MLflow's status for a state."""
        return _MLFLOW_STATUS[state]

    # -- the run ---------------------------------------------------------------------------------

    @property
    def client(self) -> MlflowClient:
        assert self._client is not None, "update() opens the run first"
        return self._client

    @property
    def run_id(self) -> str:
        assert self.state.run_id is not None, "update() opens the run first"
        return self.state.run_id

    @property
    def experiment_id(self) -> str:
        assert self.state.experiment_id is not None, "update() opens the run first"
        return self.state.experiment_id

    def _connect(self) -> tuple[MlflowClient, str]:
        """Return a client of the store, and the id of the experiment."""
        return store.connect(self.uri, self._experiment, self._folder.path.parent)

    def _open(self, status: Status) -> MlflowClient:
        client, experiment_id = self._connect()
        if self.state.run_id is None or not _is_active(client, self.state.run_id):
            self._create(client, experiment_id, status)
        return client

    def _create(self, client: MlflowClient, experiment_id: str, status: Status) -> None:
        if self.state.run_id is not None:  # somebody deleted it in MLflow
            self.state = ExportState(uri=self.state.uri)
        found: Sequence[Run] = ()
        if self.state.experiment_id is not None:  # a request that timed out may have created it
            found = client.search_runs([experiment_id], f"tags.`gpc.key` = '{self.state.key}'")
        self.state.experiment_id = experiment_id
        self._save()  # before the run is created, so that it can be found by its key
        if found:
            run = found[0]
        else:
            with store.sent_once():
                run = client.create_run(
                    experiment_id,
                    start_time=translate.ms(status.started_s),
                    run_name=self._run_name(),
                    tags={"gpc.key": self.state.key} | self._first_tags(),
                )
        self.state.run_id = run.info.run_id
        self._save()

    def _send_status(self, status: Status, version: str) -> None:
        name = self._folder.status.name
        if self.state.state is not None and self.state.sent.get(name) == version:
            return
        word = self._mlflow_status(status.state)
        if word == "RUNNING":
            self.client.update_run(self.run_id, status=word)
        else:
            self.client.set_terminated(self.run_id, word, translate.ms(status.updated_s))
        self._set_tags({"gpc.state": status.state, "gpc.reason": status.reason})
        self.state.state = status.state
        self.state.sent[name] = version
        self._save()

    # -- files -----------------------------------------------------------------------------------

    def _send_new(self, path: Path, send: Callable[[], None] | None = None) -> None:
        """Make a file an artifact. If it is new or changed, call `send`, which sends what is made of its content.

        Raises:
            UserError: it is not in the folder: a link in somebody's folder may lead to a file of this user.
        """
        self._files[path.name] = inside(self._folder.path, path.name)
        version = files.version(path)
        if send is None or not version or self.state.sent.get(path.name) == version:
            return
        send()
        self.state.sent[path.name] = version
        self._save()

    def _try_artifacts(self, status: Status) -> Exception | None:
        """Send new artifacts; return why the store did not take them, or does not since a moment ago."""
        if time.monotonic() < self.outage.until_s:
            return self.outage.error
        try:
            self._send_artifacts(status)
        except UserError:  # of the folder, not of the store
            raise
        except Exception as error:  # each kind of store raises its own
            self.outage.error, self.outage.until_s = error, time.monotonic() + _OUTAGE_S
            return error
        return None

    def _send_artifacts(self, status: Status) -> None:
        for name, path in self._files.items():
            version, key = files.version(path), f"artifact {name}"
            if version and self.state.sent.get(key) != version:
                self.client.log_text(self.run_id, redact(path.read_text(encoding="utf-8")), name)
                self.state.sent[key] = version
                self._save()

    def _send_facts(self) -> None:
        facts = files.read_json(self._folder.facts)
        self._set_tags(translate.fact_tags(facts, self._folder))
        if dataset := facts.get("dataset"):
            self._send_dataset(dataset)

    def _send_dataset(self, described: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(**translate.dataset(described))
        use = InputTag("mlflow.data.context", "training")
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [use])])

    def _send_params(self, wanted: Mapping[str, str], tags: Mapping[str, Any]) -> None:
        """Send params that MLflow does not hold, and tags."""
        from mlflow.entities import Param

        held = self.client.get_run(self.run_id).data.params
        new = [Param(name, value) for name, value in wanted.items() if name not in held]
        for start in range(0, len(new), _PER_CALL):
            self.client.log_batch(self.run_id, params=new[start : start + _PER_CALL])
        # MLflow's params cannot be changed; a tag has the value that a resume changed (more steps, for example).
        changed = {name: value for name, value in wanted.items() if held.get(name, value) != value}
        where = {"gpc.run_dir": str(self._folder)}
        self._set_tags({f"gpc.changed.{name}": value for name, value in changed.items()} | {**tags} | where)

    # -- metrics and tags ------------------------------------------------------------------------

    def _send_metrics(self, points: Iterable[translate.Point], model_id: str | None = None) -> None:
        from mlflow.entities import Metric

        batch: list[Metric] = []
        reached: dict[str, int] = {}
        for name, value, time_ms, step in points:
            name = translate.name(name)
            if step <= max(reached.get(name, -1), self.state.steps.get(name, -1)):
                continue
            batch.append(Metric(name, value, time_ms, step, model_id=model_id))
            reached[name] = step
            if len(batch) == _METRICS_PER_CALL:
                self._send_batch(batch, reached)
                batch = []
        if batch:
            self._send_batch(batch, reached)

    def _send_batch(self, batch: list[Metric], reached: Mapping[str, int]) -> None:
        self.client.log_batch(self.run_id, metrics=batch)
        self.state.steps.update(reached)
        self._save()

    def _set_tags(self, tags: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        given = [RunTag(name, value) for name, value in translate.tags(tags).items()]
        for start in range(0, len(given), _PER_CALL):
            self.client.log_batch(self.run_id, tags=given[start : start + _PER_CALL])

    def _save(self) -> None:
        self.state.save(self._folder)


def _is_active(client: MlflowClient, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
