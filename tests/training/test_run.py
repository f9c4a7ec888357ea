"""One rank in this process: what a run writes, and how it goes on."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from gpc_dist import config, schema
from gpc_dist.distributed import checkpoint
from gpc_dist.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USAGE
from gpc_dist.training import train
from gpc_dist.training.stop import SIGNALS, StopRequest
from gpc_dist.training.train import run_training
from tests.conftest import gpc, losses


def test_a_run_writes_one_folder(run: Path) -> None:
    names = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert names == {
        "adapter",
        "checkpoints",
        "config.yaml",
        "facts.json",
        "metrics.jsonl",
        "result.json",
        "status.json",
    }


def test_the_result_has_every_promised_entry(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    promised = (
        "task method metrics majority_baseline steps world_size zero_stage trainable_parameters frozen_parameters "
        "samples_per_s tokens_per_s padding_pct step_ms peak_memory_mib load_s wall_s mlflow_run_id"
    ).split()
    assert set(promised) <= result.keys()
    assert result["metrics"]["best"]["accuracy"] >= result["metrics"]["last"]["accuracy"]
    assert result["majority_baseline"]["accuracy"] == pytest.approx(11 / 23)


def test_the_written_configuration_is_complete_and_makes_the_same_run(run: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load((run / "config.yaml").read_text())
    assert {f"{s}.{k}" for s, section in tree.items() for k in section} == set(schema.all_keys(config.Config))
    assert gpc("train", run / "config.yaml", "--run.dir", tmp_path / "again") == 0
    assert losses(tmp_path / "again") == losses(run)


def test_a_start_that_gets_nowhere_says_so(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the batch script, which has the job tried again a few times only."""
    note = tmp_path / "note"
    monkeypatch.setenv("GPC_DIST_IDLE", str(note))
    built = config.load(str(tiny_recipe), {"run.dir": str(tmp_path / "run")})
    for step in (1, 2):
        stop = StopRequest()
        stop.signal = "SIGUSR2"
        assert run_training(built, time.time(), ["gpc-dist"], stop) == EXIT_STOPPED
        assert max(losses(tmp_path / "run")) == step
        assert note.exists()
        note.unlink()
    monkeypatch.setenv("GPC_DIST_IDLE", str(tmp_path / "missing" / "note"))  # as in a container
    assert run_training(built, time.time(), ["gpc-dist"], stop) == EXIT_STOPPED


def test_evaluation_stands_in_the_metrics_by_step(run: Path) -> None:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "val/accuracy" in line] == [4, 8, 12]


def test_the_best_and_the_last_checkpoints_are_kept(tiny_recipe: Path, tmp_path: Path) -> None:
    assert (
        gpc("train", tiny_recipe, "--run.dir", tmp_path, "--train.eval_every", 2, "--train.keep_last", 2) == 0
    )
    best = json.loads((tmp_path / "result.json").read_text())["metrics"]["best_step"]
    kept = {checkpoint.step_of(path) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {best, 10, 12}


def test_evaluate_gives_the_reported_metric_for_any_batch_size(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = json.loads((run / "result.json").read_text())["metrics"]["best"]
    for tokens in (30, 100000):
        assert (
            gpc("evaluate", run / "adapter", "--train.eval_batch_tokens", tokens, "--engine.device", "cpu")
            == 0
        )
        printed = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert printed["examples"] == 23
        assert printed["metrics"] == pytest.approx(expected)


def test_a_run_with_a_holdout_never_reads_the_validation_split(
    tiny_recipe: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(tiny_data / "train.jsonl", data)
    held_out = ("--data.path", data, "--data.holdout", 0.2)
    assert gpc("train", tiny_recipe, "--run.dir", tmp_path / "run", *held_out) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["selected_on"] == "holdout"
    facts = json.loads((tmp_path / "run" / "facts.json").read_text())["dataset"]
    assert (facts["train_examples"], facts["validation_examples"]) == (56, 14)
    assert result["majority_baseline"]["accuracy"] == 0.5
    evaluate = ("evaluate", tmp_path / "run" / "adapter", "--engine.device", "cpu")
    capsys.readouterr()

    def printed(*more: object) -> dict[str, Any]:
        assert gpc(*evaluate, *more) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    held = printed("--split", "holdout")
    assert (held["split"], held["examples"]) == ("holdout", 14)
    assert held["metrics"] == pytest.approx(result["metrics"]["best"])
    official = printed("--data.validation", tiny_data / "validation.jsonl")
    assert (official["split"], official["examples"]) == ("validation", 23)
    assert gpc(*evaluate) == EXIT_USAGE
    assert "no validation file" in capsys.readouterr().err


def test_predict_writes_a_line_for_every_row(run: Path, tiny_data: Path, tmp_path: Path) -> None:
    rows = [{"text": json.loads(line)["text"]} for line in (tiny_data / "validation.jsonl").open()]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        gpc("predict", run / "adapter", "--input", source, "--output", target, "--engine.device", "cpu") == 0
    )
    predictions = [json.loads(line) for line in target.open()]
    assert [p["id"] for p in predictions] == list(range(23))
    assert all(sum(p["probabilities"].values()) == pytest.approx(1) for p in predictions)
    likelier = [max(p["probabilities"], key=p["probabilities"].__getitem__) for p in predictions]
    assert [p["prediction"] for p in predictions] == likelier
    right = ["with" if "cat" in row["text"].split() else "without" for row in rows]
    hits = sum(mine == other for mine, other in zip(likelier, right, strict=True))
    best = json.loads((run / "result.json").read_text())["metrics"]["best"]
    assert hits / 23 == pytest.approx(best["accuracy"])


def test_predict_keeps_ids_reads_no_labels_and_writes_csv(run: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("id,text,label\nA-7,the cat,?\nB-8,a dog,\n")
    words = ("--input", source, "--output", target, "--engine.device", "cpu")
    assert gpc("predict", run / "adapter", *words) == 0
    with target.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert list(rows[0]) == ["id", "prediction", "probability_with", "probability_without"]
    assert [row["id"] for row in rows] == ["A-7", "B-8"]
    for row in rows:
        shares = {label: float(row[f"probability_{label}"]) for label in ("with", "without")}
        assert row["prediction"] == max(shares, key=shares.__getitem__)
        assert sum(shares.values()) == pytest.approx(1)


def test_result_and_evaluation_tell_the_classes_of_the_best_adapter(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((run / "result.json").read_text())
    counts = result["confusion_matrix"]["counts"]
    assert result["confusion_matrix"]["labels"] == list(result["per_class"]) == ["with", "without"]
    assert [sum(row) for row in counts] == [11, 12]
    best = result["metrics"]["best"]
    assert (counts[0][0] + counts[1][1]) / 23 == pytest.approx(best["accuracy"])
    f1 = [scores["f1"] for scores in result["per_class"].values()]
    assert sum(f1) / 2 == pytest.approx(best["f1_macro"])
    assert gpc("evaluate", run / "adapter", "--engine.device", "cpu") == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["per_class"] == result["per_class"]
    assert printed["confusion_matrix"] == result["confusion_matrix"]


def test_the_matrix_of_the_best_adapter_survives_a_resume(
    run: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    words = ("--run.dir", tmp_path / "run", "--train.steps", 13, "--train.lr", 1e-9)
    assert gpc("train", tiny_recipe, *words) == 0
    before, after = (json.loads((f / "result.json").read_text()) for f in (run, tmp_path / "run"))
    assert after["metrics"]["best_step"] == before["metrics"]["best_step"]
    assert after["confusion_matrix"] == before["confusion_matrix"]


def test_with_balanced_weights_all_classes_count_alike_in_the_loss(
    tiny_recipe: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (tiny_data / "train.jsonl").read_text().splitlines(keepends=True)
    parts = {"rare": [line for line in lines if '"with"' in line][:9]}
    parts |= {"frequent": [line for line in lines if '"without"' in line]}
    parts |= {"train": [line for part in parts.values() for line in part]}
    for name, part in parts.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    recipe = ("train", tiny_recipe, "--data.path", tmp_path, "--data.validation", "train.jsonl")
    still = ("--train.steps", 1, "--train.batch_size", 64, "--train.lr", 1e-12, "--train.cell_lr", 1e-12)
    for weights in ("none", "balanced"):
        words = ("--run.dir", tmp_path / weights, "--train.class_weights", weights)
        assert gpc(*recipe, *still, *words) == 0
    loss = {}
    for name in parts:
        capsys.readouterr()
        words = ("--data.validation", f"{name}.jsonl", "--engine.device", "cpu")
        assert gpc("evaluate", tmp_path / "balanced" / "adapter", *words) == 0
        loss[name] = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]["loss"]
    assert losses(tmp_path / "none")[1] == pytest.approx(loss["train"], rel=1e-4)
    assert losses(tmp_path / "balanced")[1] == pytest.approx((loss["rare"] + loss["frequent"]) / 2, rel=1e-4)
    assert abs(loss["rare"] - loss["frequent"]) > 0.1


@pytest.mark.parametrize("folder", ["2024", "tickets #2", "demo", "null", "[a"])
def test_the_folder_of_an_input_may_have_any_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "new.jsonl").write_text('{"text": "the cat"}\n')
    words = ("--input", f"{folder}/new.jsonl", "--output", "out.jsonl", "--engine.device", "cpu")
    assert gpc("predict", run / "adapter", *words) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


def test_early_stopping_ends_the_run(tiny_recipe: Path, tmp_path: Path) -> None:
    more = ("--train.steps", 400, "--train.eval_every", 1, "--train.patience", 3, "--train.lr", 1e-9)
    assert gpc("train", tiny_recipe, "--run.dir", tmp_path, *more, "--train.cell_lr", 1e-9) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["steps"] == result["metrics"]["best_step"] + 3 < 400


def test_a_finished_run_is_extended_by_more_steps(run: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    assert gpc("train", tiny_recipe, "--run.dir", tmp_path / "run", "--train.steps", 14) == 0
    extended = losses(tmp_path / "run")
    assert sorted(extended) == list(range(1, 15))
    assert {step: extended[step] for step in range(1, 13)} == losses(run)


def test_adafactor_resumes_bit_for_bit(tiny_recipe: Path, tmp_path: Path) -> None:
    more = ("--train.optimizer", "adafactor", "--train.schedule", "constant", "--train.warmup", 0)
    for folder in ("whole", "parts"):
        assert gpc("train", tiny_recipe, "--run.dir", tmp_path / folder, *more) == 0
    last, trained = Path("checkpoints") / "step-00000012", "trained.safetensors"
    shutil.rmtree(tmp_path / "parts" / last)
    (tmp_path / "parts" / "metrics.jsonl").write_text("")  # so that what is compared has been written again
    assert gpc("train", tiny_recipe, "--run.dir", tmp_path / "parts", *more) == 0
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert parts == {step: whole[step] for step in range(9, 13)}
    mine, other = (load_file(tmp_path / name / last / trained) for name in ("parts", "whole"))
    assert mine.keys() == other.keys()
    assert all(mine[key].equal(other[key]) for key in mine)


def test_resume_false_starts_again(run: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    arguments = ("--run.dir", tmp_path / "run", "--train.resume", "false", "--train.steps", 3)
    assert gpc("train", tiny_recipe, *arguments) == 0
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3]


def test_a_non_finite_loss_ends_the_run_with_one_message(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--train.lr", 1e30, "--train.warmup", 0, "--train.clip_norm", "null", "--train.steps", 50)
    assert gpc("train", tiny_recipe, "--run.dir", tmp_path, *arguments) == EXIT_USAGE
    said = capsys.readouterr().err
    assert "the loss was not finite (nan or inf) for 3 steps" in said
    assert "lower train.lr" in said
    assert not (tmp_path / "result.json").exists()
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        (
            "shape",
            {"layers": 2, "hidden_size": 32, "embedding_size": 32},
            "encoder layers 2, .* has layers 4",
        ),
        ("labels", ["with", "without", "both"], "has 2 outputs, and task 'cats' needs 3"),
    ],
)
def test_an_adapter_is_evaluated_on_its_own_encoder_and_task_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], section: str, value: Any, message: str
) -> None:
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    card = json.loads(path.read_text())
    (card if section == "shape" else card["task"]["task"])[section] = value
    path.write_text(json.dumps(card))
    assert gpc("evaluate", tmp_path / "adapter", "--engine.device", "cpu") == EXIT_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


def test_a_signal_when_all_is_trained_does_not_end_what_records_it(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = train._Record.end

    def record_late(*arguments: Any) -> None:
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        record(*arguments)

    monkeypatch.setattr(train._Record, "end", record_late)
    assert gpc("train", tiny_recipe, "--run.dir", tmp_path) == EXIT_DONE
    assert (tmp_path / "result.json").exists()
