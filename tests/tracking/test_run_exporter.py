"""What of a run folder arrives in MLflow: every value once, everything where its UI looks."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from gpc_dist import files
from gpc_dist.runs.folder import RunFolder
from gpc_dist.runs.metrics import MetricLog
from gpc_dist.tracking import pictures
from gpc_dist.tracking.exporter import ArtifactError
from gpc_dist.tracking.run_exporter import RunExporter

from .conftest import MakeRun
from .searches import WRITES


def store_of(run: RunFolder) -> str:
    return f"sqlite:///{run.path.parent}/mlflow.db"


def client_of(run: RunFolder) -> MlflowClient:
    return MlflowClient(store_of(run))


def run_id_of(run: RunFolder) -> str:
    return str(files.read_json(run.tracking)["run_id"])


def recorded(run: RunFolder) -> Run:
    return client_of(run).get_run(run_id_of(run))


def history(run: RunFolder, metric: str) -> list[tuple[int, float]]:
    points = client_of(run).get_metric_history(run_id_of(run), metric)
    return sorted((point.step, point.value) for point in points)


def write(run: RunFolder, metric: str, values: dict[int, float]) -> None:
    with MetricLog(run.metrics) as log:
        for step, value in values.items():
            log.append(step, {metric: value})


def test_whole_run(make_run: MakeRun) -> None:
    run = make_run(tracking__group="seeds")
    run.write_status("running")
    write(run, "train/loss", {10: 0.5, 20: float("nan")})
    with MetricLog(run.host_telemetry("n1")) as telemetry:
        telemetry.append(0, {"gpu/0/util_pct": 90.0}, time_s=1000.0)
        telemetry.append(0, {"gpu/0/util_pct": 95.0}, time_s=1010.0)
    result = {"steps": 20, "metrics": {"best": {"accuracy": 0.8}}, "peak_memory_mib": [5, 7]}
    files.write_json(run.result, result | {"task": "rte"})
    run.write_status("finished", "all steps done")

    state = RunExporter(run).update()

    assert state.complete
    found = recorded(run)
    assert found.info.status == "FINISHED"
    assert found.info.start_time == int(run.read_status().started_s * 1000)
    assert found.info.run_name == run.path.name
    params = found.data.params
    assert params["train.lr"] == "0.01"
    assert params["train.betas"] == "[0.9, 0.999]"
    assert not {"tracking.experiment", "task.label_names", "data.path"} & params.keys()
    tags = found.data.tags
    expected = {
        "task": "rte",
        "method": "gpc",
        "group": "seeds",
        "host": "node7",
        "version.torch": "2.13.0+cpu",
        "git_dirty": "true",
        "mlflow.source.git.commit": "c0ffee",
        "gpc.state": "finished",
        "gpc.reason": "all steps done",
    }
    assert expected.items() <= tags.items()
    assert "    gpc-dist train rte\n" in tags["mlflow.note.content"]
    assert found.inputs is not None
    (use,) = found.inputs.dataset_inputs
    assert (use.dataset.name, use.dataset.digest) == ("rte", "5" * 36)
    assert json.loads(use.dataset.profile or "") == {
        "train_examples": 2490,
        "validation_examples": 277,
    }

    (first, second) = history(run, "train/loss")
    assert first == (10, 0.5)
    assert second[0] == 20
    assert math.isnan(second[1])
    assert history(run, "system/n1/gpu/0/util_pct") == [(0, 90.0), (1, 95.0)]
    assert history(run, "final/metrics/best/accuracy") == [(20, 0.8)]
    assert history(run, "final/peak_memory_mib") == [(20, 7.0)]
    listed = {item.path for item in client_of(run).list_artifacts(found.info.run_id)}
    assert listed == {"config.yaml", "ds_config.json", "facts.json", "result.json"}


def test_classes_are_metrics_and_a_picture(make_run: MakeRun) -> None:
    run = make_run()
    labels = ["$5 & more", "n/a", "..", "\u826f\u3044", "\u60aa\u3044", "l" * 300]
    scores = {"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "examples": 4}
    result = {
        "steps": 7,
        "per_class": dict.fromkeys(labels, scores),
        "confusion_matrix": {"labels": labels, "counts": np.eye(6, dtype=int).tolist()},
    }
    files.write_json(run.result, result)
    run.write_status("running")
    exporter = RunExporter(run)
    exporter.update()

    def shown() -> list[str]:
        listed = client_of(run).list_artifacts(run_id_of(run))
        return [item.path for item in listed if item.path.endswith(".png")]

    assert shown() == []
    run.write_status("finished")
    exporter.update()
    assert shown() == ["confusion_matrix.png"]
    picture = Path(client_of(run).download_artifacts(run_id_of(run), "confusion_matrix.png"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    names = recorded(run).data.metrics
    assert history(run, "final/per_class/n_a/f1") == [(7, pytest.approx(1 / 3))]
    assert len([name for name in names if name.startswith("final/per_class/")]) == 4 * len(labels)
    assert not [name for name in names if "confusion" in name]


@pytest.mark.parametrize(("classes", "texts"), [(2, 4), (40, 0), (150, 0)])
def test_a_confusion_matrix_is_drawn_for_any_number_of_classes(classes: int, texts: int) -> None:
    figure = pictures.confusion(
        [f"label number {k} of many" for k in range(classes)], np.eye(classes, dtype=int)
    )  # type: ignore[arg-type]
    (axes,) = figure.axes
    assert len(axes.texts) == texts
    assert [label.get_text() for label in axes.get_yticklabels()][1:2] == (
        ["label number 1 of many"] if classes <= 100 else []
    )


def test_only_what_is_new_is_sent(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    run.write_status("running")
    exporter = RunExporter(run)
    write(run, "train/loss", {1: 1.0, 2: 0.9})
    exporter.update()
    calls: list[str] = []
    for name in WRITES:
        monkeypatch.setattr(MlflowClient, name, lambda *_, name=name, **__: calls.append(name))
    exporter.update()
    RunExporter(run).update()
    assert calls == []
    write(run, "train/loss", {3: 0.8})
    exporter.update()
    assert calls == ["log_batch"]


def test_resume_reopens_the_run_and_repeats_no_step(make_run: MakeRun) -> None:
    run = make_run()
    run.write_status("running")
    write(run, "train/loss", {1: 1.0, 2: 0.9, 3: 0.8, 4: 0.7})
    run.write_status("stopped", "SIGUSR2")
    first = RunExporter(run).update().run_id
    assert recorded(run).info.status == "KILLED"
    assert recorded(run).data.tags["gpc.state"] == "stopped"

    run.write_status("running")
    exporter = RunExporter(run)
    with MetricLog(run.metrics) as log:
        log.truncate_after(2)
        exporter.update()
        assert recorded(run).info.status == "RUNNING"
        for step in (3, 4, 5):
            # as long as the lines they stand for, so that no file size gives the resume away
            log.append(step, {"train/loss": 0.5})
            log.append(step, {"val/accuracy": 0.5})
        exporter.update()
    run.write_status("finished")
    assert RunExporter(run).update().run_id == first
    assert history(run, "train/loss") == [(1, 1.0), (2, 0.9), (3, 0.8), (4, 0.7), (5, 0.5)]
    assert history(run, "val/accuracy") == [(3, 0.5), (4, 0.5), (5, 0.5)]
    assert recorded(run).info.status == "FINISHED"


def test_resume_with_another_configuration_is_told_by_a_tag(make_run: MakeRun) -> None:
    run = make_run(train__steps="100")
    RunExporter(run).update()
    make_run(run.path, train__steps="200", train__patience="3")
    RunExporter(run).update()
    data = recorded(run).data
    assert (data.params["train.steps"], data.tags["gpc.changed.train.steps"]) == ("100", "200")
    assert data.params["train.patience"] == "3"


def test_request_repeated_after_a_crash_has_no_effect(make_run: MakeRun) -> None:
    run = make_run()
    exporter = RunExporter(run)
    exporter.update()
    before = asdict(exporter.state)
    write(run, "train/loss", {1: 1.0, 2: float("nan")})
    exporter.update()
    files.write_json(run.tracking, before)  # as if the note had not been written
    RunExporter(run).update()
    assert [step for step, _ in history(run, "train/loss")] == [1, 2]


def test_run_created_by_a_request_that_seemed_lost_is_found_again(make_run: MakeRun) -> None:
    run = make_run()
    first = RunExporter(run).update()
    files.write_json(run.tracking, asdict(first) | {"run_id": None})
    assert RunExporter(run).update().run_id == first.run_id


def test_run_deleted_in_mlflow_begins_anew(make_run: MakeRun) -> None:
    run = make_run()
    write(run, "train/loss", {1: 1.0})
    first = RunExporter(run).update().run_id
    assert first is not None
    client_of(run).delete_run(first)
    assert RunExporter(run).update().run_id != first
    assert history(run, "train/loss") == [(1, 1.0)]


def test_many_metrics_and_odd_names(make_run: MakeRun) -> None:
    run = make_run()
    with MetricLog(run.metrics) as log:
        for step in range(3):
            log.append(step, {f"val/f1[{i}]": i for i in range(700)})
    RunExporter(run).update()
    assert history(run, "val/f1_699_") == [(0, 699.0), (1, 699.0), (2, 699.0)]


def test_credentials_stay_in_the_folder(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "https://me:hunter2@mlflow.example.org"
    run = make_run(data__path=f"{uri}/rte")
    tree = run.read_config()
    tree["tracking"]["uri"] = uri  # as recipes once could
    run.config.write_text(yaml.safe_dump(tree))
    facts = files.read_json(run.facts) | {"command": f"gpc-dist train --tracking.uri {uri}"}
    files.write_json(run.facts, facts | {"dataset": facts["dataset"] | {"source": f"{uri}/rte"}})
    exporter = RunExporter(run, uri=store_of(run))
    exporter.update()
    sent = Path(client_of(run).download_artifacts(run_id_of(run), ""))
    config = yaml.safe_load((sent / "config.yaml").read_text())
    assert config["tracking"]["uri"].endswith("//***@mlflow.example.org")
    assert recorded(run).data.tags["command"].endswith("//***@mlflow.example.org")
    assert recorded(run).data.params["data.path"] == "https://***@mlflow.example.org/rte"
    texts = [path.read_text() for path in sent.rglob("*") if path.is_file()]
    assert len(texts) == 3  # with ds_config.json and facts.json
    assert "hunter2" not in "".join([*texts, str(recorded(run).to_dictionary()), run.tracking.read_text()])


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A serving module that answers with the text it was given and the adapter's name."""
    (tmp_path / "echo_serving.py").write_text(
        textwrap.dedent("""
            from pathlib import Path

            class Echo:
                def __init__(self, name):
                    self.name = name

                def predict(self, model_input, params=None):
                    rows = model_input.itertuples(index=False)
                    return [f"{self.name}: {' '.join(row)}" for row in rows]

            def _load_pyfunc(path):
                return Echo((Path(path) / "adapter_config.json").read_text())
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "echo_serving"


def test_adapter_is_a_model(make_run: MakeRun, loader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    files.write_text(run.adapter / "adapter_config.json", "first")
    files.write_json(run.result, {"steps": 5, "metrics": {"accuracy": 0.75}})
    run.write_status("finished")

    state = RunExporter(run, loader_module=loader).update()

    assert loader not in sys.modules, "recording a model must not load it"
    client = client_of(run)
    model = client.get_logged_model(str(state.model_id))
    assert (model.name, model.status, model.source_run_id) == ("adapter", "READY", state.run_id)
    assert {m.key: m.value for m in model.metrics or []}["final/metrics/accuracy"] == 0.75
    outputs = recorded(run).outputs
    assert outputs is not None
    (output,) = outputs.model_outputs
    assert (output.model_id, output.step) == (state.model_id, 5)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store_of(run))
    served = mlflow.pyfunc.load_model(f"models:/{state.model_id}")
    table = pd.DataFrame({"premise": ["It rains."], "hypothesis": ["It is wet."]})
    assert served.predict(table) == ["first: It rains. It is wet."]
    assert served.metadata.get_input_schema().input_names() == ["premise", "hypothesis"]
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{state.model_id}"))
    assert {path.name for path in folder.rglob("*")}.isdisjoint({"python_model.pkl"})
    requirements = (folder / "requirements.txt").read_text().split()
    assert "torch==2.13.0" in requirements  # no package index has the local part +cpu
    assert "gpc-dist==0.1.0" in requirements

    # A resumed run ends with another adapter; one that is the same is not recorded again.
    (run.path / ".model-killed" / "model").mkdir(parents=True)
    (run.path / ".model-mine").mkdir()
    (run.path / ".model-mine" / "notes").touch()
    run.write_status("finished")
    assert RunExporter(run, loader_module=loader).update().model_id == state.model_id
    files.write_text(run.adapter / "adapter_config.json", "second")
    again = RunExporter(run, loader_module=loader).update()
    assert again.model_id != state.model_id
    assert mlflow.pyfunc.load_model(f"models:/{again.model_id}").predict(table) == [
        "second: It rains. It is wet."
    ]
    assert [path.name for path in run.path.glob(".model-*")] == [".model-mine"]


def test_model_without_signature_gets_the_whole_table(
    make_run: MakeRun, loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    facts = files.read_json(run.facts)
    del facts["signature"]
    files.write_json(run.facts, facts)
    files.write_text(run.adapter / "adapter_config.json", "any")
    run.write_status("finished")
    state = RunExporter(run, loader_module=loader).update()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store_of(run))
    served = mlflow.pyfunc.load_model(f"models:/{state.model_id}")
    table = pd.DataFrame({"premise": ["It rains."], "hypothesis": ["It is wet."]})
    assert served.predict(table) == ["any: It rains. It is wet."]


def test_interrupted_upload_leaves_one_model(
    make_run: MakeRun, loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    files.write_text(run.adapter / "adapter_config.json", "only")
    run.write_status("finished")

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("the server went away")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_model_artifacts", refuse)
        with pytest.raises(ArtifactError, match="the server went away"):
            RunExporter(run, loader_module=loader).update()
    assert recorded(run).info.status == "FINISHED"
    state = RunExporter(run, loader_module=loader).update()
    models = client_of(run).search_logged_models(
        [str(state.experiment_id)], filter_string=f"source_run_id = '{state.run_id}'"
    )
    assert [(model.model_id, model.status) for model in models] == [(state.model_id, "READY")]


class _Killed(BaseException):
    """Like a signal, it is caught by nothing."""


def test_killed_between_any_request_and_its_note_it_goes_on(
    make_run: MakeRun, loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tracking__experiment="killed")
    files.write_text(run.adapter / "adapter_config.json", "only")
    files.write_json(run.result, {"steps": 5, "metrics": {"accuracy": 0.75}})
    files.write_json(run.facts, {"dataset": {"name": "cats", "source": "here", "digest": "1"}})
    write(run, "train/loss", {1: 1.0, 2: 0.5})
    run.write_status("finished")
    noted, killed = files.write_json, set[str]()

    def kill_once(path: Path, state: Any) -> None:
        # a key and ids that were not noted are others the next time
        what = {
            key: bool(value) if key in ("key", "run_id", "model_id") else value
            for key, value in state.items()
        }
        if path == run.tracking and str(what) not in killed:
            killed.add(str(what))
            raise _Killed
        noted(path, state)

    monkeypatch.setattr(files, "write_json", kill_once)
    while True:
        try:
            state = RunExporter(run, loader_module=loader).update()
            break
        except _Killed:
            pass
    assert len(killed) > 10, "each note, once"
    assert history(run, "train/loss") == [(1, 1.0), (2, 0.5)]
    found = recorded(run)
    assert found.info.status == "FINISHED"
    assert len(found.inputs.dataset_inputs) == 1
    client, experiment = client_of(run), [str(state.experiment_id)]
    assert [each.info.run_id for each in client.search_runs(experiment)] == [state.run_id]
    assert [(m.model_id, m.status) for m in client.search_logged_models(experiment)] == [
        (state.model_id, "READY")
    ]
    assert found.outputs is not None
    assert [(each.model_id, each.step) for each in found.outputs.model_outputs] == [(state.model_id, 5)]
