"""Reads the runs of an MLflow experiment for a comparison."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpc_dist import files
from gpc_dist.errors import MachineError, UserError
from gpc_dist.runs.folder import RunFolder
from gpc_dist.runs.metrics import STEP, TIME
from gpc_dist.runs.records import EVALUATION, TRAIN_LOSS, Record, make_record, new_folder
from gpc_dist.runs.result import RunResult
from gpc_dist.shown import redact
from gpc_dist.tracking.store import open_client
from gpc_dist.typed import read_as

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun


def read_experiment(name: str, uri: str | None) -> list[Record]:
    """The runs of an MLflow experiment that this program recorded.

    Args:
        uri: tracking store; MLFLOW_TRACKING_URI, or the file `mlflow.db` in `runs/` or in the working folder, when not
            given.

    Raises:
        UserError: the store or the experiment does not exist, or has no readable run.
        MachineError: the store cannot be reached or refuses.
    """
    uri = uri or _default_uri(name)
    try:
        client = open_client(uri)
        found = client.get_experiment_by_name(name)
        if found is None:
            known = ", ".join(sorted(e.name for e in client.search_experiments())) or "none"
            raise UserError(
                f"{name} is neither a folder nor an experiment in {redact(uri)}: there are {known}"
            )
        records = [_read_mlflow_run(client, run) for run in _all_runs(client, found.experiment_id)]
    except UserError:
        raise
    except Exception as error:  # database, HTTP and artifact stores raise errors of their own
        raise MachineError(
            f"MLflow at {redact(uri)} did not give the runs of {name}: {redact(str(error))}"
        ) from error
    kept = [record for record in records if record is not None]
    if not kept:
        raise UserError(
            f"the experiment {name} in {redact(uri)} holds no run of gpc-dist whose config.yaml can be "
            "read: compare the folder of the runs instead"
        )
    return kept


def _default_uri(name: str) -> str:
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    for database in (Path("runs/mlflow.db"), Path("mlflow.db")):
        if database.is_file():
            return f"sqlite:///{database.absolute()}"
    raise UserError(
        f"{name} is no folder, and there is no mlflow.db in runs or here to find it in as an experiment: "
        "give a folder that exists, or the tracking store with --uri"
    )


def _all_runs(client: MlflowClient, experiment_id: str) -> Iterable[MlflowRun]:
    token = None
    while True:
        page = client.search_runs([experiment_id], page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _read_mlflow_run(client: MlflowClient, run: MlflowRun) -> Record | None:
    """The record of a run; None if it has no `config.yaml`: it is another program's, or has just started."""
    run_id, tags = run.info.run_id, run.data.tags
    name = tags.get("mlflow.runName", run_id)
    with tempfile.TemporaryDirectory() as temporary:
        folder = RunFolder(temporary)
        held = {file.path for file in client.list_artifacts(run_id)}
        for path in (folder.config, folder.result, folder.facts):
            if path.name in held:
                client.download_artifacts(run_id, path.name, temporary)
        if not folder.config.is_file():
            return None
        config, result, facts = (
            folder.read_config(),
            read_as(RunResult, folder.result),
            files.read_json(folder.facts),
        )
    config_file = f"mlflow-{run_id}/config.yaml"
    download = (
        f"mlflow artifacts download --run-id {run_id} --artifact-path config.yaml --dst-path mlflow-{run_id}"
    )
    return make_record(
        name,
        config=config,
        result=result,
        facts=facts,
        lines=_history(client, run),
        state=tags.get("gpc.state", run.info.status.lower()),
        reason=tags.get("gpc.reason", ""),
        started_s=(run.info.start_time or 0) / 1000,
        again=[download, f"gpc-dist train {config_file} {new_folder(name)}"],
    )


def _history(client: MlflowClient, run: MlflowRun) -> list[dict[str, Any]]:
    """A run's losses and evaluations as the lines of its `metrics.jsonl`."""
    lines: dict[tuple[int, float], dict[str, Any]] = {}
    for name in run.data.metrics:
        if name == TRAIN_LOSS or name.startswith(EVALUATION):
            for point in client.get_metric_history(run.info.run_id, name):
                time_s = point.timestamp / 1000
                line = lines.setdefault((point.step, time_s), {STEP: point.step, TIME: time_s})
                line[name] = point.value
    return [lines[key] for key in sorted(lines)]
