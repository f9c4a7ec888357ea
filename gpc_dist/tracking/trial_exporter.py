"""Exports a trial to MLflow as a run that is a child of its search's run.

Differences to the export of a single run: store, experiment and parent are given by the search, not
by the trial's configuration; `trial.json` becomes tags; `final/best` is the best value of the
search's metric, also for trials that were stopped early; and only the best trial's adapter becomes a
model, because it would be hard to find among hundreds of models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from gpc_dist import files
from gpc_dist.runs import metrics
from gpc_dist.runs.folder import RunFolder, State, Status, TrialFolder
from gpc_dist.tracking import translate
from gpc_dist.tracking.exporter import Outage
from gpc_dist.tracking.run_exporter import RunExporter

if TYPE_CHECKING:
    from mlflow import MlflowClient

BEST = "final/best"
"""Metric of a trial and of a search; sorts trials in MLflow, also those that did not finish."""

_PARENT = "parent"
_MODEL_BEST = f"{BEST} of the model"
_TAGS = ("search", "trial", "number", "seed_group", "lane", "decision", "host")

# MLflow's status by the driver's decision, for trials that did not end by themselves.
_MLFLOW_STATUS = {
    "stopped by scheduler": "FINISHED",  # as intended by the search
    "failed": "FAILED",
}


@dataclass(frozen=True)
class Objective:
    """The metric that a search optimises."""

    metric: str
    """Its name in `metrics.jsonl`, with or without `val/`."""
    mode: str
    """`max` or `min`."""

    def best(self, folder: RunFolder) -> tuple[float, int] | None:
        """The best value that a run measured, and the run's last step; None if it measured no value."""
        lines = metrics.read_metrics(folder.metrics)
        measured = [line.get(self.metric, line.get(f"val/{self.metric}")) for line in lines]
        values = [float(value) for value in measured if value is not None and math.isfinite(value)]
        if not values:
            return None
        return max(values) if self.mode == "max" else min(values), int(lines[-1][metrics.STEP])


class Search(Protocol):
    """What an exporter of a trial needs from its search."""

    uri: str
    outage: Outage

    @property
    def name(self) -> str: ...

    @property
    def objective(self) -> Objective | None: ...

    @property
    def client(self) -> MlflowClient: ...

    @property
    def run_id(self) -> str: ...

    @property
    def experiment_id(self) -> str: ...


class TrialExporter(RunExporter):
    """Brings MLflow up to date with a trial's folder; `update` needs the tracking lock of the search.

    Args:
        folder: a trial that has begun (`TrialFolder.begun`).
        search: the search, whose run in MLflow is open.
        loader_module: module that loads the adapter as a model.
        best: whether this is the best trial of a finished search.

    Raises:
        UserError: the folder is not a run folder, or `trial.json` is broken.
    """

    def __init__(self, folder: TrialFolder, search: Search, loader_module: str, best: bool = False) -> None:
        super().__init__(folder, search.uri, loader_module)
        self._trial_file = folder.trial
        self._trial = files.read_json(folder.trial)
        self._search = search
        self.outage = search.outage
        self._best = best

    def _send_content(self, status: Status) -> None:
        super()._send_content(status)
        if self.state.sent.get(_PARENT) != self._search.run_id:
            self.state.sent.pop(self._trial_file.name, None)
        self._send_new(self._trial_file, self._send_trial)
        if status.state != "running":
            self._send_best()

    def _connect(self) -> tuple[MlflowClient, str]:
        return self._search.client, self._search.experiment_id

    def _run_name(self) -> str:
        number = self._trial.get("number")
        return self._folder.path.name if number is None else f"{self._search.name}-{number:03d}"

    def _first_tags(self) -> dict[str, str]:
        return {"mlflow.parentRunId": self._search.run_id}

    def _wants_model(self, status: Status) -> bool:
        return self._best

    def _mlflow_status(self, state: State) -> str:
        usual = super()._mlflow_status(state)
        return _MLFLOW_STATUS.get(self._trial.get("decision", ""), usual) if usual == "KILLED" else usual

    def _send_trial(self) -> None:
        self._trial = files.read_json(self._trial_file)
        tags: dict[str, Any] = {name: self._trial.get(name) for name in _TAGS}
        # the parent again, because its run may have been deleted in MLflow and created again
        self._set_tags(tags | self._first_tags())
        self.state.sent[_PARENT] = self._search.run_id
        self.state.sent.pop(self._folder.status.name, None)  # the status depends on the decision

    def _send_best(self) -> None:
        objective = self._search.objective
        if objective is None or (found := objective.best(self._folder)) is None:
            return
        value, step = found
        time_ms = translate.ms(self._folder.metrics.stat().st_mtime)
        model_id = self.state.model_id
        if model_id is not None and self.state.sent.get(_MODEL_BEST) != model_id:
            # sent again for the model, which lacks it; the run ignores a value that it holds
            self.state.steps.pop(BEST, None)
            self.state.sent[_MODEL_BEST] = model_id
        self._send_metrics([(BEST, value, time_ms, step)], model_id)
