"""Runs as configurations: what is grouped, what is ranked, and the numbers in the table."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from gpc_dist import cli, config, files
from gpc_dist.errors import EXIT_USAGE, MachineError, UserError
from gpc_dist.reports.comparison import Comparison, compare, comparison_table, shorten, show_score
from gpc_dist.reports.importance import Importance, importance
from gpc_dist.reports.scales import is_log, scale_of
from gpc_dist.runs import records
from gpc_dist.runs.folder import RunFolder
from gpc_dist.runs.metrics import MetricLog
from gpc_dist.tasks import metrics as task_metrics
from gpc_dist.tracking.sync import sync_run

STARTED_S = 1_000_000.0


def write_run(
    folder: Path,
    best: float | None = None,
    *,
    evaluations: Sequence[float | None] = (),
    metric: str = "accuracy",
    state: str = "finished",
    facts: Mapping[str, Any] | None = None,
    wall_s: float = 100.0,
    energy_j: float | None = None,
    world_size: int = 1,
    **settings: object,
) -> RunFolder:
    """A run folder as training leaves it; with `best` its run is finished.

    Args:
        evaluations: values of the metric at steps 10, 20, ...; None is NaN.
        settings: `train__lr=0.1` is the key train.lr.
    """
    run = RunFolder(folder)
    keys = {name.replace("__", "."): str(value) for name, value in settings.items()}
    named = {
        "run.name": folder.name,
        "task.name": "rte",
        "tracking.uri": f"sqlite:///{folder.parent}/mlflow.db",
    }
    files.write_text(run.config, config.build({}, named | keys).to_yaml())
    files.write_json(run.facts, {"command": f"gpc-dist train {folder.name}", **(facts or {})})
    with MetricLog(run.metrics) as log:
        for number, value in enumerate(evaluations, start=1):
            time_s = STARTED_S + 5 * number
            log.append(10 * number, {"train/loss": 1 / number, "train/tokens_per_s": 7}, time_s - 1)
            score = float("nan") if value is None else value
            log.append(10 * number, {f"val/{metric}": score, "val/f1_macro": score / 2}, time_s)
    if best is not None:
        result = {
            "task": keys.get("task.name", "rte"),
            "main_metric": metric,
            "metrics": {"best": {metric: best, "f1_macro": best / 2}, "last": {metric: 0.0}, "best_step": 10},
            "majority_baseline": {metric: 0.5, "f1_macro": 0.25},
            "world_size": world_size,
            "wall_s": wall_s,
            "energy_j": energy_j,
            "steps": 10 * len(evaluations),
        }
        files.write_json(run.result, result)
    status = {"state": state, "reason": "", "started_s": STARTED_S, "updated_s": STARTED_S + 60}
    files.write_json(run.status, status)
    return run


def only(place: Path, metric: str | None = None) -> Comparison:
    (comparison,) = compare(str(place), metric)
    return comparison


def scores(comparison: Comparison) -> list[str]:
    return [show_score(configuration) for configuration in comparison.configurations]


def test_seeds_are_one_configuration(tmp_path: Path) -> None:
    for seed, best in enumerate([0.7, 0.8, 0.9]):
        write_run(tmp_path / f"a{seed}", best, run__seed=seed, train__lr=0.1, tracking__group=f"g{seed}")
    write_run(tmp_path / "b", 0.81, train__lr=0.01, train__resume=False)
    comparison = only(tmp_path)
    best, second = comparison.configurations
    assert [run.name for run in second.runs] == ["a0", "a1", "a2"]
    assert second.mean == pytest.approx(0.8)
    assert second.std == pytest.approx(0.1)  # sqrt((0.01 + 0 + 0.01) / 2)
    assert (best.mean, best.std, best.baseline("accuracy")) == (0.81, None, 0.5)
    assert scores(comparison) == ["0.8100", "0.8000 ± 0.1000"]
    assert comparison.varied == {"train.lr": "lr"}


def test_a_repetition_is_not_a_seed(tmp_path: Path) -> None:
    write_run(tmp_path / "first", 0.7)
    write_run(tmp_path / "unfinished", evaluations=[0.9], state="running")
    (configuration,) = only(tmp_path).configurations
    assert configuration.values == [0.7]


def test_names_of_settings_are_short_unless_two_are_the_same(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.7, encoder__path="one", data__path="x", adapter__cell_rank=8)
    write_run(tmp_path / "b", 0.7, encoder__path="two", data__path="y")
    varied = {"encoder.path": "encoder.path", "data.path": "data.path", "adapter.cell_rank": "cell_rank"}
    assert only(tmp_path).varied == varied


def test_unfinished_runs_count_with_their_best_evaluation(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.6, evaluations=[0.6])
    stopped = write_run(
        tmp_path / "b", evaluations=[0.5, None, 0.7, 0.65], state="stopped", train__lr=1, engine__ranks=4
    )
    write_run(tmp_path / "c", evaluations=[None], state="failed", train__lr=2)
    write_run(tmp_path / "d", state="running", train__lr=3)
    files.write_json(stopped.path / "trial.json", {"search": "s", "decision": "pruned", "lane": None})
    comparison = only(tmp_path)
    assert scores(comparison) == ["0.7000", "0.6000", "-", "-"]
    first = comparison.configurations[0]
    assert first.state == "stopped (pruned)"
    assert (first.seconds, first.cost_s) == (20, 80)  # from the start to the last line, on 4 ranks
    assert comparison.configurations[1].cost_s == 100
    assert comparison.configurations[3].seconds is None
    assert {c.state for c in comparison.configurations[2:]} == {"failed", "running"}


def test_smaller_errors_are_better(tmp_path: Path) -> None:
    assert task_metrics.LOWER_IS_BETTER <= records.LOWER_IS_BETTER
    write_run(tmp_path / "a", 0.9, metric="rmse", task__metric="rmse")
    write_run(tmp_path / "b", evaluations=[0.4, 0.3, 0.8], metric="rmse", task__metric="rmse", train__lr=1)
    comparison = only(tmp_path)
    assert scores(comparison) == ["0.3000", "0.9000"]
    assert "lower is better" in comparison_table(comparison)


def test_each_task_is_compared_by_itself(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.9)
    write_run(tmp_path / "b", 0.4, task__name="cb", metric="average", data__path="elsewhere")
    write_run(tmp_path / "c", state="running", task__name="cb")
    found = compare(str(tmp_path))
    assert [(c.task, c.metric, len(c.runs)) for c in found] == [("cb", "average", 2), ("rte", "accuracy", 1)]
    assert found[1].varied == {}


def test_another_metric_is_that_of_the_selected_checkpoint(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.8)
    write_run(tmp_path / "b", evaluations=[0.6, 0.9], state="failed", train__lr=1)
    comparison = only(tmp_path, "f1_macro")
    assert (comparison.metric, scores(comparison)) == ("f1_macro", ["0.4500", "0.4000"])
    with pytest.raises(UserError, match="--metric one of accuracy, f1_macro"):
        compare(str(tmp_path), "bleu")


def test_cost_and_energy(tmp_path: Path) -> None:
    gpu = {"gpu": "H100", "gpus": 8}
    for seed, wall_s in enumerate((100.0, 300.0)):
        write_run(
            tmp_path / f"g{seed}",
            0.8,
            run__seed=seed,
            facts=gpu,
            world_size=8,
            wall_s=wall_s,
            energy_j=1500 + 1000 * seed,
        )
    write_run(tmp_path / "c", 0.7, facts=gpu, engine__device="cpu", world_size=2, wall_s=50.0)
    packed = write_run(tmp_path / "p", 0.6, facts=gpu, engine__device="cpu", world_size=2, train__lr=0.5)
    result = json.loads(packed.result.read_text())
    packed.result.write_text(json.dumps(result | {"share_s": 10.0}))
    table = comparison_table(only(tmp_path))
    header, _, first, second, third = table.splitlines()[2:]
    assert third.split()[-4:-1] == ["100", "20", "CPU-s"]
    assert header.split()[-2:] == ["energy,", "kJ"]
    assert first.split()[-4:] == ["200", "1,600", "GPU-s", "2.0"]
    assert second.split()[-4:] == ["50", "100", "CPU-s", "-"]


def test_a_search_has_its_runs_in_trials(tmp_path: Path) -> None:
    write_run(tmp_path / "s" / "trials" / "t0", 0.7)
    write_run(tmp_path / "s" / "not-a-trial", 0.9)
    assert scores(only(tmp_path / "s")) == ["0.7000"]
    assert scores(only(tmp_path / "s" / "trials" / "t0")) == ["0.7000"]  # a run's own folder


def test_places_without_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="holds no run: give a folder"):
        compare(str(tmp_path))
    with pytest.raises(UserError, match=r"no mlflow\.db in runs or here.*--uri"):
        compare("nowhere")
    with pytest.raises(UserError, match=r"no tracking store .*none\.db.*--uri"):
        compare("nowhere", uri="sqlite:///none.db")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MachineError, match="did not give the runs of nowhere"):
        compare("nowhere", uri="http://127.0.0.1:9")


def test_an_experiment_says_what_its_folders_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_store: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    runs.mkdir()
    shutil.copy(mlflow_store, runs / "mlflow.db")
    finished = write_run(runs / "a", 0.7, evaluations=[0.6, 0.7], train__lr=0.1, wall_s=12.5)
    stopped = write_run(runs / "b", evaluations=[0.5, None, 0.8], state="stopped", train__lr=0.2)
    for run in (finished, stopped):
        sync_run(run.path)
    (there,), here = compare("gpc-dist"), only(runs)
    assert scores(there) == scores(here) == ["0.8000", "0.7000"]
    for mine, other in zip(here.runs, there.runs, strict=True):
        assert (mine.name, mine.state, mine.settings) == (other.name, other.state, other.settings)
        assert mine.curves == other.curves
        assert (mine.wall_s, mine.baseline, mine.command) == (other.wall_s, other.baseline, other.command)
        assert other.again[0].startswith("mlflow artifacts download --run-id ")
    with pytest.raises(UserError, match=r"nor an experiment in sqlite.*there are Default, gpc-dist"):
        compare("unknown")


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where no earlier run has left a store
    write_run(tmp_path / "a", 0.7)
    assert cli.main(["compare", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "rte: 1 configuration, 1 run, by accuracy (higher is better)" in said
    assert said.splitlines()[-1].split() == ["1", "1", "0.7000", "0.5000", "finished", "100", "100", "CPU-s"]
    assert cli.main(["compare", str(tmp_path / "none")]) == EXIT_USAGE
    assert "is no folder" in capsys.readouterr().err


# -- scales and importance ----------------------------------------------------------------------------


def test_scales() -> None:
    rates = scale_of([1e-4, 1e-3, 1e-2, 1e-1])
    assert (rates.kind, rates.positions) == ("log", pytest.approx([0, 1 / 3, 2 / 3, 1]))
    assert [text for _, text in rates.ticks] == ["0.0001", "0.001", "0.01", "0.1"]
    assert scale_of([10, 20, 30]).positions == [0, 0.5, 1]
    ranks = scale_of([None, 8, 32])  # those that are not set lie apart
    assert (ranks.positions[0], ranks.positions[2]) == (0, 1)
    assert 0.1 < ranks.positions[1] < 0.2
    assert scale_of(["b", "a", None, True, 3]).kind == "categories"
    assert scale_of([True, False, True]).positions == [1, 0, 1]
    assert scale_of([5, 5]).positions == [0.5, 0.5]
    assert scale_of([None, None]).positions == [0.5, 0.5]
    assert scale_of([float("nan"), 1.0]).kind == "categories"
    assert len(scale_of([f"value {number}" for number in range(200)]).ticks) <= 21


def test_logarithmic_axes() -> None:
    assert is_log([0.0001, 0.0003, 0.002, 0.01, 0.1])
    assert not is_log([0.01, 0.2, 0.4, 0.6, 0.8, 1.0])  # a wide range, but even
    assert not is_log([0, 1, 100])
    assert not is_log([1, 2, 4])


def test_long_texts_lose_their_middle() -> None:
    assert shorten("/data/models/roberta-large", 15) == "/data…rta-large"
    assert len(shorten("x" * 99)) == 28


def grid(folder: Path, side: int) -> Comparison:
    """The metric follows `train.lr` alone."""
    for lr in range(1, side + 1):
        for decay in range(side):
            write_run(folder / f"{lr}-{decay}", 0.5 + 0.05 * lr, train__lr=lr, train__weight_decay=decay)
    return only(folder)


def test_importance_finds_the_setting_that_matters(tmp_path: Path) -> None:
    found = importance(grid(tmp_path, 5))
    assert isinstance(found, Importance)
    (first, most, _), (second, least, _) = found.settings
    assert (first, second) == ("train.lr", "train.weight_decay")
    values = [0.05 * lr for lr in range(5)]
    expected = statistics.fmean(abs(a - b) for a in values for b in values)  # of a perfect model
    assert most == pytest.approx(expected, rel=0.15)
    assert abs(least) < 0.05 * most
    assert found.explained > 0.9


def test_importance_needs_enough_to_learn_from(tmp_path: Path) -> None:
    found = importance(grid(tmp_path, 2))
    assert isinstance(found, str)
    assert found.startswith("Too few configurations: 4 ")
    for number in range(8):
        write_run(tmp_path / "same" / f"run-{number}", 0.5, train__lr=number + 1)
    same = importance(only(tmp_path / "same"))
    assert isinstance(same, str)
    assert "the same accuracy" in same
