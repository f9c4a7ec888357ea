"""Searches without training: what a driver writes of them, and what a store then knows."""

from __future__ import annotations

from collections.abc import Callable

from mlflow import MlflowClient
from mlflow.entities import Run

from gpc_dist import files
from gpc_dist.runs.folder import SearchFolder, TrialFolder

READS = ("get_", "search_", "list_", "download_", "load_")
WRITES = [
    name
    for name, member in vars(MlflowClient).items()
    if callable(member) and not name.startswith(("_", *READS))
]
"""Methods of a client that change a store."""

MakeSearch = Callable[..., SearchFolder]
AddTrial = Callable[..., TrialFolder]


def decide(trial: TrialFolder, search: SearchFolder, number: int, decision: str) -> None:
    described = {
        "search": search.path.name,
        "trial": trial.path.name,
        "number": number,
        "seed_group": f"lr{number // 2}",
        "settings": {"train.lr": 0.001 * (number + 1), "adapter.cell": "gated"},
        "lane": number % 2,
        "decision": decision,
        "host": "node3",
    }
    files.write_json(trial.trial, described)


def finish(search: SearchFolder, best: TrialFolder, value: float) -> None:
    result = {"best_trial": best.path.name, "metric": "accuracy", "mode": "max", "best": value}
    counts = {"trials": 4, "finished": 2, "stopped": 1, "failed": 1, "wall_s": 7.5}
    files.write_json(search.result, result | counts)
    search.write_status("finished")


def store_of(search: SearchFolder) -> str:
    return f"sqlite:///{search.path.parent}/mlflow.db"


def parent_of(search: SearchFolder, uri: str | None = None) -> Run:
    run_id = str(files.read_json(search.tracking)["run_id"])
    return MlflowClient(uri or store_of(search)).get_run(run_id)


def children_of(search: SearchFolder, uri: str | None = None) -> dict[str, Run]:
    parent = parent_of(search, uri)
    found = MlflowClient(uri or store_of(search)).search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    by_trial = {run.data.tags["trial"]: run for run in found}
    assert len(by_trial) == len(found), "a trial has one run"
    return by_trial


def steps_of(search: SearchFolder, run: Run, metric: str) -> list[int]:
    history = MlflowClient(store_of(search)).get_metric_history(run.info.run_id, metric)
    return sorted(point.step for point in history)
