"""The replica of one run folder in MLflow.

`Replica.update` sends what MLflow does not hold yet, and may be called at any time, any number of
times, by whoever holds the folder's tracking lock. What becomes of the files:

| file              | in MLflow                                                              |
|-------------------|------------------------------------------------------------------------|
| `config.yaml`     | params under their dotted names; artifact                              |
| `ds_config.json`  | artifact                                                               |
| `facts.json`      | tags (`version.torch`, ...), description, data set input; artifact     |
| `metrics.jsonl`   | metrics                                                                |
| `telemetry/`      | metrics `system/<host>/...`, shown as system metrics                   |
| `result.json`     | metrics `final/...`; artifact                                          |
| `adapter/`        | an MLflow model, once the run is finished                              |
| `status.json`     | the run's status; tags `gpc.state`, `gpc.reason`                       |

A metric is sent once per step. MLflow cannot take a value back, so when a resumed run writes steps
again that MLflow already holds, the first values stand. A crash between sending and noting that
down repeats a request, which has no effect: each value carries the time of its line, and MLflow's
stores ignore a metric they already hold with the same step, time and value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpc_dist import files
from gpc_dist.config import TrackingConfig
from gpc_dist.tracking import metrics, model, store, translate
from gpc_dist.tracking.folder import RunFolder, Status
from gpc_dist.tracking.state import TrackingState

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

# limits of MLflow's API
_METRICS_PER_CALL = 1000
_PER_CALL = 100  # params, and tags

_MLFLOW_STATUS = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "killed": "KILLED",
    "stopped": "KILLED",  # MLflow has no state for "to be continued"; `gpc.state` tells
}


class Replica:
    """Brings MLflow up to date with a run folder.

    Args:
        folder: a run folder with at least `config.yaml`.
        uri: tracking store; the one of the run's configuration when not given.
        loader_module: module that loads the adapter as a model.

    Raises:
        UserError: the folder is not that of a run.
    """

    def __init__(
        self, folder: RunFolder, uri: str | None = None, loader_module: str = model.SERVING_MODULE
    ) -> None:
        self._folder = folder
        self._loader_module = loader_module
        self._config = folder.read_config()
        section = self._config.get("tracking", {})
        self._experiment = section.get("experiment") or TrackingConfig().experiment
        where = TrackingConfig(uri=uri or section.get("uri"))
        self.uri = store.tracking_uri(where, folder.path)
        self.state = TrackingState.load(folder)
        if self.state.uri != store.redact(self.uri):  # none yet, or a replica in another store
            self.state = TrackingState(uri=store.redact(self.uri))
        self._read: dict[Path, tuple[int, int]] = {}  # file -> bytes and lines sent
        self._client: MlflowClient | None = None

    def update(self) -> TrackingState:
        """Send what is new. After an exception, call it again.

        Raises:
            mlflow.exceptions.MlflowException: the store cannot be reached or refuses.
        """
        # First, because an end state promises that everything else is complete.
        status = self._folder.read_status()
        if self._client is None:
            self._client = self._open(status)
        self._send_new(self._folder.config, self._send_config)
        self._send_new(self._folder.ds_config)
        self._send_new(self._folder.facts, self._send_facts)
        self._send_new_metrics()
        if status.state == "finished":
            self._send_adapter()
        self._send_new(self._folder.result, self._send_result)
        self._send_status(status)
        return self.state

    # -- the run ---------------------------------------------------------------------------------

    @property
    def _mlflow(self) -> MlflowClient:
        assert self._client is not None, "update() opens the run first"
        return self._client

    @property
    def _run_id(self) -> str:
        assert self.state.run_id is not None, "update() opens the run first"
        return self.state.run_id

    def _open(self, status: Status) -> MlflowClient:
        client, experiment_id = store.connect(self.uri, self._experiment, self._folder.path.parent)
        if self.state.run_id is None or not _is_active(client, self.state.run_id):
            self._create(client, experiment_id, status)
        return client

    def _create(self, client: MlflowClient, experiment_id: str, status: Status) -> None:
        if self.state.run_id is not None:  # somebody deleted it in MLflow
            self.state = TrackingState(uri=self.state.uri)
        self.state.experiment_id = experiment_id
        self._save()  # the key first: a run created under it can be found again
        found = client.search_runs([experiment_id], f"tags.`gpc.key` = '{self.state.key}'")
        run = (
            found[0]
            if found
            else client.create_run(
                experiment_id,
                start_time=translate.ms(status.started_s),
                run_name=self._config.get("run", {}).get("name") or self._folder.path.name,
                tags={"gpc.key": self.state.key},
            )
        )
        self.state.run_id = run.info.run_id
        self._save()

    def _send_status(self, status: Status) -> None:
        if status.state == self.state.state:
            return
        if status.state == "running":
            self._mlflow.update_run(self._run_id, status="RUNNING")
        else:
            self._mlflow.set_terminated(
                self._run_id, _MLFLOW_STATUS[status.state], translate.ms(status.updated_s)
            )
        self._set_tags({"gpc.state": status.state, "gpc.reason": status.reason})
        self.state.state = status.state
        self._save()

    # -- files -----------------------------------------------------------------------------------

    def _send_new(self, path: Path, also: Callable[[], None] | None = None) -> None:
        """Send a file as an artifact, and what else is made of its content, if it is new."""
        if not path.exists():
            return
        stat = path.stat()
        version = f"{stat.st_mtime_ns}-{stat.st_size}"
        if self.state.sent.get(path.name) == version:
            return
        text = store.redact(path.read_text(encoding="utf-8"))
        self._mlflow.log_text(self._run_id, text, path.name)
        if also is not None:
            also()
        self.state.sent[path.name] = version
        self._save()

    def _send_config(self) -> None:
        from mlflow.entities import Param

        config = self._config = self._folder.read_config()
        held = self._mlflow.get_run(self._run_id).data.params
        wanted = translate.params(config)
        new = [Param(name, value) for name, value in wanted.items() if name not in held]
        for start in range(0, len(new), _PER_CALL):
            self._mlflow.log_batch(self._run_id, params=new[start : start + _PER_CALL])
        # MLflow's params are for ever; what a resume changed (more steps, say) is told by a tag.
        changed = {name: value for name, value in wanted.items() if held.get(name, value) != value}
        self._set_tags(
            {f"gpc.changed.{name}": value for name, value in changed.items()}
            | translate.config_tags(config)
            | {"gpc.run_dir": str(self._folder)}
        )

    def _send_facts(self) -> None:
        facts = files.read_json(self._folder.facts)
        self._set_tags(translate.fact_tags(facts, self._folder))
        if dataset := facts.get("dataset"):
            self._send_dataset(dataset)

    def _send_dataset(self, described: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(**translate.dataset(described))
        use = InputTag("mlflow.data.context", "training")
        self._mlflow.log_inputs(self._run_id, [DatasetInput(dataset, [use])])

    def _send_result(self) -> None:
        result = files.read_json(self._folder.result)
        step = int(result.get("steps", 0))
        time_ms = translate.ms(self._folder.result.stat().st_mtime)
        self._send_metrics(
            ((f"final/{name}", value, time_ms, step) for name, value in translate.numbers(result)),
            model_id=self.state.model_id,
        )

    def _send_adapter(self) -> None:
        from mlflow.entities import LoggedModelOutput

        adapter = self._folder.adapter
        if not adapter.is_dir():
            return
        version = model.digest(adapter)
        if self.state.sent.get("adapter") == version:
            return
        if self.state.sent.get("adapter created") != version:
            created = self._mlflow.create_logged_model(
                str(self.state.experiment_id),
                name="adapter",
                source_run_id=self._run_id,
                params=translate.params(self._config),
                model_type="gpc-dist adapter",
            )
            self.state.model_id = created.model_id
            self.state.sent["adapter created"] = version
            self._save()
        facts = files.read_json(self._folder.facts)
        model_id = str(self.state.model_id)
        model.log_adapter(self._mlflow, model_id, adapter, facts, self._loader_module)
        step = int(files.read_json(self._folder.result).get("steps", 0))
        self._mlflow.log_outputs(self._run_id, [LoggedModelOutput(model_id, step)])
        self.state.sent["adapter"] = version
        self._save()

    # -- metrics ---------------------------------------------------------------------------------

    def _send_new_metrics(self) -> None:
        self._send_log(self._folder.metrics)
        for path in sorted(self._folder.telemetry.glob("*.jsonl")):
            self._send_log(path, host=path.stem)

    def _send_log(self, path: Path, host: str | None = None) -> None:
        """Send the lines of a `MetricLog` that were added since the last call."""
        offset, count = self._read.get(path, (0, 0))
        lines, end = files.read_lines(path, offset)
        points: list[translate.Point] = []
        for number, line in enumerate(lines, start=count):
            if host is None and metrics.STEP in line:
                points += translate.points(line, step=line[metrics.STEP])
            elif host is not None:
                # Samples have no step of their own and go on in the same file after a resume: the
                # number of the line is one.
                points += translate.points(line, step=number, prefix=f"system/{host}/")
        self._send_metrics(points)
        # Not kept in the state: a resume may have cut the file. Reading it again from its start
        # is cheap, and `state.steps` knows what MLflow holds.
        self._read[path] = (end, count + len(lines))

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
        self._mlflow.log_batch(self._run_id, metrics=batch)
        self.state.steps.update(reached)
        self._save()

    # -- small things ----------------------------------------------------------------------------

    def _set_tags(self, tags: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        given = [RunTag(name, value) for name, value in translate.tags(tags).items()]
        for start in range(0, len(given), _PER_CALL):
            self._mlflow.log_batch(self._run_id, tags=given[start : start + _PER_CALL])

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
