"""Exports a run folder to MLflow.

| file              | in MLflow                                                              |
|-------------------|------------------------------------------------------------------------|
| `config.yaml`     | params under their dotted names; artifact                              |
| `ds_config.json`  | artifact                                                               |
| `facts.json`      | tags (`version.torch`, ...), description, data set input; artifact     |
| `metrics.jsonl`   | metrics                                                                |
| `telemetry/`      | metrics `system/<host>/...`, shown as system metrics                   |
| `result.json`     | metrics `final/...`; artifact; `confusion_matrix.png`, finished        |
| `adapter/`        | an MLflow model, once the run is finished; artifacts of a server without models |
| `status.json`     | the run's status; tags `gpc.state`, `gpc.reason`                       |
"""

from __future__ import annotations

from pathlib import Path

from gpc_dist import files
from gpc_dist.names import inside
from gpc_dist.runs import metrics
from gpc_dist.runs.folder import RunFolder, Status
from gpc_dist.tracking import model, pictures, translate
from gpc_dist.tracking.exporter import Exporter
from gpc_dist.tracking.store import sent_once

_ADAPTER, _CREATING, _CREATED = "adapter", "adapter being created", "adapter created"
_VERSION = "gpc.version"
"""Tag of a model: the digest of the adapter's files."""
_NO_MODELS = ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED", "FEATURE_DISABLED")
"""Errors of servers without logged models (MLflow 2, some clouds), where the adapter is an artifact of its run."""


class RunExporter(Exporter):
    """Brings MLflow up to date with a run folder.

    Args:
        folder: a run folder with at least `config.yaml`.
        uri: tracking store; that of the run's configuration when not given.
        loader_module: module that loads the adapter as a model.

    Raises:
        UserError: the folder is not a run folder.
    """

    def __init__(
        self, folder: RunFolder, uri: str | None = None, loader_module: str = model.SERVING_MODULE
    ) -> None:
        super().__init__(folder, uri)
        self._loader_module = loader_module
        self._read: dict[Path, tuple[int, int, int]] = {}  # file -> inode, bytes and lines sent

    def _send_content(self, status: Status) -> None:
        self._send_new(self._folder.config, self._send_config)
        self._send_new(self._folder.ds_config)
        self._send_new(self._folder.facts, self._send_facts)
        self._send_new_metrics()
        if self._wants_model(status):
            self._create_model()
        self._send_new(self._folder.result, self._send_result)

    def _send_artifacts(self, status: Status) -> None:
        super()._send_artifacts(status)
        if self._wants_model(status):
            self._send_picture()
            self._send_adapter()

    def _wants_model(self, status: Status) -> bool:
        return status.state == "finished"

    def _run_name(self) -> str:
        return self._config.get("run", {}).get("name") or super()._run_name()

    # -- files -----------------------------------------------------------------------------------

    def _send_config(self) -> None:
        self._config = self._folder.read_config()
        self._send_params(translate.params(self._config), translate.config_tags(self._config))

    def _send_result(self) -> None:
        result = files.read_json(self._folder.result)
        if "per_class" in result:
            result["per_class"] = translate.in_names(result["per_class"])
        step = int(result.get("steps", 0))
        time_ms = translate.ms(self._folder.result.stat().st_mtime)
        self._send_metrics(
            ((f"final/{name}", value, time_ms, step) for name, value in translate.numbers(result)),
            model_id=self.state.model_id,
        )

    def _send_picture(self) -> None:
        version = files.version(self._folder.result)
        matrix = files.read_json(self._folder.result).get("confusion_matrix")
        if matrix is None or self.state.sent.get(pictures.CONFUSION) == version:
            return
        with pictures.style():
            figure = pictures.confusion(matrix["labels"], matrix["counts"])
            self.client.log_figure(self.run_id, figure, pictures.CONFUSION)
        self.state.sent[pictures.CONFUSION] = version
        self._save()

    def _create_model(self) -> None:
        """Create the model of the adapter, still without files, so that metrics can be the model's too."""
        from mlflow.exceptions import MlflowException

        version = self._adapter_version()
        if version is None or self.state.sent.get(_CREATED) == version:
            return
        try:
            self.state.model_id = self._model_of(version)
        except MlflowException as error:
            if error.error_code not in _NO_MODELS:
                raise
            self.state.model_id = None
        self.state.sent[_CREATED] = version
        self._save()

    def _model_of(self, version: str) -> str:
        """Id of the model of this version of the adapter, which is created if it is not there yet."""
        if self.state.sent.get(_CREATING) == version:  # a request that timed out may have created it
            found = self.client.search_logged_models(
                [self.experiment_id],
                f"source_run_id = '{self.run_id}' AND tags.`{_VERSION}` = '{version}'",
                max_results=1,
            )
            if found:
                return str(found[0].model_id)
        self.state.sent[_CREATING] = version
        self._save()
        with sent_once():
            created = self.client.create_logged_model(
                self.experiment_id,
                name=_ADAPTER,
                source_run_id=self.run_id,
                tags={_VERSION: version},
                params=translate.params(self._config),
                model_type="gpc-dist adapter",
            )
        return str(created.model_id)

    def _send_adapter(self) -> None:
        version, model_id = self._adapter_version(), self.state.model_id
        if version is None or self.state.sent.get(_ADAPTER) == version:
            return
        adapter = self._folder.adapter
        if model_id is None:
            self.client.log_artifacts(self.run_id, str(adapter), _ADAPTER)
        else:
            facts = files.read_json(self._folder.facts)
            place = self._folder.path
            model.log_adapter(self.client, model_id, adapter, facts, place, self._loader_module)
            self._link_model(model_id)
        self.state.sent[_ADAPTER] = version
        self._save()

    def _link_model(self, model_id: str) -> None:
        """Make the model an output of the run, unless it is: an exporter may have been killed since. A database refuses
        the same link twice."""
        from mlflow.entities import LoggedModelOutput

        outputs = self.client.get_run(self.run_id).outputs
        if outputs is not None and model_id in (each.model_id for each in outputs.model_outputs):
            return
        step = int(files.read_json(self._folder.result).get("steps", 0))
        with sent_once():
            self.client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step)])

    def _adapter_version(self) -> str | None:
        """The digest of the adapter's files; None without an adapter.

        Raises:
            UserError: one of them is not in the folder, see `_send_new`.
        """
        adapter = self._folder.adapter
        if not adapter.is_dir():
            return None
        for path in (adapter, *adapter.rglob("*")):
            inside(self._folder.path, path)
        return model.digest(adapter)

    # -- metrics ---------------------------------------------------------------------------------

    def _send_new_metrics(self) -> None:
        self._send_log(self._folder.metrics)
        for path in sorted(self._folder.telemetry.glob("*.jsonl")):
            self._send_log(path, host=path.stem)

    def _send_log(self, path: Path, host: str | None = None) -> None:
        """Send the lines that were added to a `MetricLog` since the last call."""
        if not path.exists():
            return
        stat = path.stat()
        inode, offset, count = self._read.get(path, (0, 0, 0))
        if inode != stat.st_ino or stat.st_size < offset:  # a resume has replaced it with a shorter file
            offset = count = 0
        lines, end = files.read_lines(path, offset)
        points: list[translate.Point] = []
        for number, line in enumerate(lines, start=count):
            if host is None and metrics.is_step(line.get(metrics.STEP)):
                points += translate.points(line, step=line[metrics.STEP])
            elif host is not None:
                # A resume appends to the same file and numbers its samples from 0 again, so the
                # line number is the step.
                points += translate.points(line, step=number, prefix=f"system/{host}/")
        self._send_metrics(points)
        # Not saved in the state, because a resume may cut the file. A new exporter reads it from
        # its start, which is cheap; `state.steps` records what MLflow holds.
        self._read[path] = (stat.st_ino, end, count + len(lines))
