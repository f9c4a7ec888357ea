"""Whole searches, made up as a driver and its trainers write them, in real stores."""

from __future__ import annotations

import os
import re
import shutil
import signal
import textwrap
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient

from gpc_dist import cli, files
from gpc_dist.errors import UserError
from gpc_dist.runs.metrics import MetricLog
from gpc_dist.tracking.search_exporter import SearchExporter, view_in_ui
from gpc_dist.tracking.sync import sync_search
from gpc_dist.tracking.trial_exporter import TrialExporter
from tests.browser import rendered

from .searches import (
    WRITES,
    AddTrial,
    MakeSearch,
    children_of,
    decide,
    finish,
    parent_of,
    steps_of,
    store_of,
)


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A serving module whose model answers with the name of its adapter."""
    (tmp_path / "name_serving.py").write_text(
        textwrap.dedent("""
            from pathlib import Path

            class Name:
                def __init__(self, name):
                    self.name = name

                def predict(self, model_input, params=None):
                    return [self.name] * len(model_input)

            def _load_pyfunc(path):
                return Name((Path(path) / "adapter_config.json").read_text())
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "name_serving"


def predictions(uri: str, model: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    table = pd.DataFrame({"premise": ["It rains."], "hypothesis": ["It is wet."]})
    answers: list[str] = mlflow.pyfunc.load_model(model).predict(table)
    return answers


def test_whole_search(
    make_search: MakeSearch, add_trial: AddTrial, loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = make_search()
    add_trial(search, 0, {2: 0.5, 4: 0.6, 6: 0.55})
    best = add_trial(search, 1, {2: 0.6, 4: 0.9, 6: 0.8})
    add_trial(search, 2, {2: 0.4}, "stopped", "stopped by scheduler")
    add_trial(search, 3, {}, "failed", "failed")
    add_trial(search, 4, {2: 0.3}, "stopped", "running")
    add_trial(search, 5, {2: 0.2}, "killed", "running")
    add_trial(search, 6, {2: 0.1}, "running", "running")
    finish(search, best, 0.9)

    state = SearchExporter(search, loader_module=loader).update()

    assert state.complete
    parent, children = parent_of(search), children_of(search)
    client = MlflowClient(store_of(search))
    assert client.get_experiment(parent.info.experiment_id).name == "searches"
    assert (parent.info.run_name, parent.info.status) == ("test_whole_search", "FINISHED")
    assert parent.data.params == {
        "recipe": "rte",
        "metric": "accuracy",
        "mode": "max",
        "space.train.lr": '{"loguniform": [0.0001, 0.01]}',
        "space.adapter.cell": '{"choice": ["gated"]}',
        "scheduler.name": "asha",
        "scheduler.grace": "2",
    }
    numbers = {"best": 0.9, "trials": 4, "finished": 2, "stopped": 1, "failed": 1, "wall_s": 7.5}
    assert parent.data.metrics == {f"final/{name}": value for name, value in numbers.items()}
    tags = {"best_trial": "t1", "metric": "accuracy", "search": search.path.name, "group": "night"}
    assert tags.items() <= parent.data.tags.items()
    note = parent.data.tags["mlflow.note.content"]
    assert "    gpc-dist tune rte\n" in note
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in note.splitlines() if line[:1] == "|"]
    assert rows[0] == ["run", "accuracy", "train.lr", "adapter.cell", "decision"]
    assert rows[2] == ["test_whole_search-001", "0.9", "0.002", "gated", "completed"]
    assert [row[1] for row in rows[2:]] == ["0.9", "0.6", "0.4", "0.3", "0.2", "0.1"]

    ends = ["FINISHED", "FINISHED", "FINISHED", "FAILED", "KILLED", "KILLED", "KILLED"]
    assert [children[f"t{number}"].info.status for number in range(7)] == ends
    assert search.trial("t6").read_status().reason == "ended with its search"
    child = children["t1"]
    assert child.info.run_name == "test_whole_search-001"
    tags = {
        "search": search.path.name,
        "trial": "t1",
        "number": "1",
        "decision": "completed",
        "host": "node3",
        "lane": "1",
        "seed_group": "lr0",
        "method": "gpc",
    }
    assert tags.items() <= child.data.tags.items()
    assert child.data.params["train.lr"] == "0.01"
    assert steps_of(search, child, "val/accuracy") == [2, 4, 6]
    assert (child.data.metrics["final/best"], child.data.metrics["final/step_ms"]) == (0.9, 5.0)
    assert children["t2"].data.tags["decision"] == "stopped by scheduler"
    assert children["t2"].data.tags["gpc.state"] == "stopped"
    assert not (search.trials / "mlflow.db").exists()

    # other searches of the store have models in this experiment too
    runs = {run.info.run_id for run in (parent, *children.values())}
    found = client.search_logged_models([parent.info.experiment_id])
    (model,) = [model for model in found if model.source_run_id in runs]
    assert model.source_run_id == child.info.run_id
    assert {m.key: m.value for m in model.metrics or []}["final/best"] == 0.9
    version = client.get_model_version("test_whole_search", "1")
    assert version.run_id == child.info.run_id
    named = {"trial": "t1", "metric": "accuracy", "mode": "max", "best": "0.9", "model_id": model.model_id}
    assert named.items() <= version.tags.items()
    assert parent.data.tags["registered_model"] == "models:/test_whole_search/1"
    assert predictions(store_of(search), "models:/test_whole_search/1", monkeypatch) == ["adapter 1"]

    calls: list[str] = []
    for name in WRITES:
        monkeypatch.setattr(MlflowClient, name, lambda *_, name=name, **__: calls.append(name))
    monkeypatch.setattr(TrialExporter, "update", lambda _: calls.append("trial"))
    assert sync_search(search.path).complete
    assert calls == []


def test_trials_that_ended_are_left_alone(
    make_search: MakeSearch, add_trial: AddTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = make_search()
    add_trial(search, 0, {1: 0.5, 2: 0.6})
    going_on = add_trial(search, 1, {1: 0.5}, "running", "running")
    updated: list[str] = []
    update = TrialExporter.update

    def counted(self: TrialExporter) -> Any:
        updated.append(self._folder.path.name)
        return update(self)

    monkeypatch.setattr(TrialExporter, "update", counted)
    exporter = SearchExporter(search)
    exporter.update()
    exporter.update()
    SearchExporter(search).update()
    assert updated == ["t0", "t1", "t1", "t1"]

    # A stopped trial goes on under the same exporter: its log is replaced by a shorter one.
    updated.clear()
    going_on.write_status("stopped")
    exporter.update()
    assert children_of(search)["t1"].info.status == "KILLED"
    decide(going_on, search, 1, "running")
    going_on.write_status("running")
    exporter.update()
    with MetricLog(going_on.metrics) as log:
        log.truncate_after(0)
        for step in (1, 2, 3):
            log.append(step, {"val/accuracy": 0.7})
    exporter.update()
    decide(going_on, search, 1, "completed")
    going_on.write_status("finished")
    exporter.update()
    exporter.update()
    assert updated == ["t1"] * 4
    child = children_of(search)["t1"]
    assert (child.info.status, child.data.tags["decision"]) == ("FINISHED", "completed")
    assert steps_of(search, child, "val/accuracy") == [1, 2, 3]
    assert child.data.metrics["final/best"] == 0.7


def test_trials_in_the_note_are_known_by_their_folders(make_search: MakeSearch, add_trial: AddTrial) -> None:
    """Ray Tune's ids, which a trial's record has, are no names of folders."""
    search = make_search()
    for number in (0, 1):
        trial = add_trial(search, number, {1: 0.5})
        files.write_json(trial.trial, files.read_json(trial.trial) | {"trial": f"../../3f_{number}"})
    for exporter in (SearchExporter(search), SearchExporter(search)):
        exporter.update()
        note = parent_of(search).data.tags["mlflow.note.content"]
        assert "| 0.001" in note
        assert "| 0.002" in note
        (search.path / "facts.json").touch()


def test_broken_trial_does_not_hold_up_the_others(make_search: MakeSearch, add_trial: AddTrial) -> None:
    search = make_search()
    broken = add_trial(search, 0, {1: 0.5})
    add_trial(search, 1, {1: 0.5})
    files.write_text(broken.trial, "{")
    exporter = SearchExporter(search)
    for _ in range(2):
        with pytest.raises(UserError, match=r"t0/trial\.json.*restore or remove it"):
            exporter.update()
    assert list(children_of(search)) == ["t1"]
    decide(broken, search, 0, "completed")
    exporter.update()
    assert sorted(children_of(search)) == ["t0", "t1"]


def test_resumed_search_has_one_record_and_a_version_for_each_best_trial(
    make_search: MakeSearch, add_trial: AddTrial
) -> None:
    search = make_search(register_as="rte-best", metric=None)
    first = add_trial(search, 0, {1: 0.5})
    finish(search, first, 0.5)
    run_id = sync_search(search.path).run_id
    assert "0.5" in parent_of(search).data.tags["mlflow.note.content"], "its result names the metric"
    search.result.unlink()
    search.write_status("running")
    second = add_trial(search, 1, {1: 0.75})
    finish(search, second, 0.75)
    os.utime(search.result, (2e9, 2e9))
    assert sync_search(search.path).run_id == run_id
    finish(search, second, 0.75)  # ended once more, with nothing new
    assert sync_search(search.path).run_id == run_id
    client = MlflowClient(store_of(search))
    versions = client.search_model_versions("name = 'rte-best'")
    assert sorted((v.version, v.tags["trial"]) for v in versions) == [(1, "t0"), (2, "t1")]
    assert parent_of(search).data.tags["registered_model"] == "models:/rte-best/2"
    assert parent_of(search).data.metrics["final/best"] == 0.75


def test_search_that_registers_nothing(make_search: MakeSearch, add_trial: AddTrial) -> None:
    search = make_search(register_as=None)
    finish(search, add_trial(search, 0, {1: 0.5}), 0.5)
    assert sync_search(search.path).complete
    assert "registered_model" not in parent_of(search).data.tags


@pytest.mark.slow
def test_tracking_server_takes_a_whole_search(
    make_search: MakeSearch,
    add_trial: AddTrial,
    loader: str,
    server_uri: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    search = make_search(register_as="served", tracking={"uri": server_uri})
    best = add_trial(search, 0, {1: 0.5})
    add_trial(search, 1, {1: 0.4}, "stopped", "stopped by scheduler")
    finish(search, best, 0.5)
    assert SearchExporter(search, loader_module=loader).update().complete
    assert parent_of(search, server_uri).info.status == "FINISHED"
    assert sorted(children_of(search, server_uri)) == ["t0", "t1"]
    assert predictions(server_uri, "models:/served/1", monkeypatch) == ["adapter 0"]


@pytest.mark.browser
def test_a_browser_shows_the_best_trials_first(
    make_search: MakeSearch, add_trial: AddTrial, server_uri: str, tmp_path: Path
) -> None:
    other = make_search(tracking={"uri": server_uri}, register_as=None)
    add_trial(other, 0, {1: 0.99})
    SearchExporter(other).update()
    shutil.move(other.path, tmp_path / "other")

    search = make_search(tracking={"uri": server_uri}, register_as=None)
    for number, value in enumerate((0.25, 0.75, 0.5)):
        add_trial(search, number, {1: value}, train__lr=f"0.{number + 1}")
    state = SearchExporter(search).update()
    shown = rendered(view_in_ui(server_uri, state), tmp_path / "table.png", *PATIENT, size=(1600, 900))
    assert column(shown, "metrics.`final/best`") == ["0.75", "0.5", "0.25"]
    assert column(shown, "params.`train.lr`") == ["0.2", "0.3", "0.1"]
    assert column(shown, "params.`adapter.cell`") == ["recurrent"] * 3


@pytest.mark.browser
def test_a_browser_shows_a_configuration_of_several_seeds_as_one_row(
    make_search: MakeSearch, add_trial: AddTrial, server_uri: str, tmp_path: Path
) -> None:
    search = make_search(tracking={"uri": server_uri}, register_as=None, seeds=[0, 1], mode="min")
    for number, value in enumerate((0.75, 0.5, 0.25, 0.5)):  # a configuration for each two
        add_trial(search, number, {1: value})
    state = SearchExporter(search).update()
    shown = rendered(view_in_ui(server_uri, state), tmp_path / "table.png", *PATIENT, size=(1600, 900))
    best = column(shown, "metrics.`final/best`")
    assert best == ["0.375 (average)", "0.25", "0.5", "0.625 (average)", "0.5", "0.75"]


PATIENT = ("--virtual-time-budget=20000",)
"""Lets the page have its data before it is looked at."""


def column(page: str, name: str) -> list[str]:
    """What MLflow's table of runs shows in a column, from its first row on."""
    rows = re.findall(r'<div[^>]*row-index="(\d+)"[^>]*>(.*?)(?=<div[^>]*row-index=|$)', page, re.DOTALL)
    cell = re.compile(rf'col-id="{re.escape(name)}"[^>]*>(.*?)</div>', re.DOTALL)
    # a row stands there several times, once for each part of the table that scrolls by itself
    cells = {int(number): found[1] for number, row in rows if (found := cell.search(row))}
    return [re.sub("<[^>]+>", "", shown) for _, shown in sorted(cells.items())]


def test_command_takes_searches_but_not_their_trials(
    make_search: MakeSearch, add_trial: AddTrial, capsys: pytest.CaptureFixture[str]
) -> None:
    search = make_search()
    trial = add_trial(search, 0, {1: 0.5}, "stopped", "running")
    search.write_status("stopped", signal.Signals.SIGUSR2.name)
    assert cli.main(["sync", str(search)]) == 0
    assert "is up to date" in capsys.readouterr().out
    assert parent_of(search).info.status == "KILLED"
    assert cli.main(["sync", str(trial)]) == 2
    assert f"gpc-dist sync {search} records it" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"not the folder of a search: it has no search\.yaml"):
        sync_search(trial.path)
    search.write_status("running")
    with search.hold_tracking():
        assert cli.main(["sync", str(search)]) == 2
    assert "is being recorded by another process" in capsys.readouterr().err
