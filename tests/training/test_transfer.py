"""Runs that start from another adapter: alone, resumed, on ranks and in a pack."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gpc_dist import config
from gpc_dist.adapter.store import AdapterCard, read_card
from gpc_dist.config import DataConfig, TaskConfig
from gpc_dist.errors import EXIT_USAGE
from gpc_dist.files import sha256
from gpc_dist.tasks import Task, make_task
from gpc_dist.training.saved_adapter import answers_alike
from tests.conftest import gpc, losses
from tests.processes import call_on_ranks, on_ranks
from tests.training.packed import run_pack

STILL = ("--train.lr", 1e-12, "--train.cell_lr", 1e-12, "--train.weight_decay", 0)
"""Rates at which nothing is learnt."""


@pytest.fixture(scope="module")
def source(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "source"
    assert gpc("train", tiny_recipe, "--run.dir", run, "--run.seed", 5, "--train.lr", 0.05) == 0
    return run / "adapter"


def tensors(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter.safetensors")


def test_a_run_starts_from_another_adapter_and_says_so(
    tiny_recipe: Path, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    words = ("--run.dir", tmp_path, "--adapter.init_from", source, *STILL)
    assert gpc("train", tiny_recipe, *words, "--train.steps", 1) == 0
    torch.testing.assert_close(tensors(tmp_path / "adapter"), tensors(source), rtol=0, atol=1e-9)
    digest = sha256(source / "adapter.safetensors")
    assert f"tiny starts from {source} (task cats, sha256 {digest[:12]}): prompt, cell, head" in caplog.text
    origin = {"task": "cats", "weights_sha256": digest, "parts": ["prompt", "cell", "head"]}
    assert json.loads((tmp_path / "result.json").read_text())["origin"] == origin
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["origin"] == origin


def test_a_run_that_resumes_does_not_read_it_again(tiny_recipe: Path, source: Path, tmp_path: Path) -> None:
    gone, run = tmp_path / "gone", tmp_path / "run"
    shutil.copytree(source, gone)
    words = ("--run.dir", run, "--adapter.init_from", gone)
    assert gpc("train", tiny_recipe, *words, "--train.steps", 4, "--train.schedule", "constant") == 0
    origin = read_card(run / "adapter").origin
    assert origin is not None
    shutil.rmtree(gone)
    assert gpc("train", tiny_recipe, *words, "--train.steps", 12, "--train.schedule", "constant") == 0
    assert len(losses(run)) == 12
    assert read_card(run / "adapter").origin == origin
    assert json.loads((run / "result.json").read_text())["origin"]["parts"] == origin.parts


def test_an_adapter_that_is_not_there_is_refused_before_anything_is_written(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, missing = tmp_path / "run", tmp_path / "missing"
    missing.mkdir()
    assert gpc("train", tiny_recipe, "--run.dir", run, "--adapter.init_from", missing) == EXIT_USAGE
    assert f"adapter.init_from: no adapter in {missing}" in capsys.readouterr().err
    assert not (run / "config.yaml").exists()


@pytest.mark.slow
def test_two_ranks_start_as_one_does(tiny_recipe: Path, source: Path, tmp_path: Path) -> None:
    words = ("--adapter.init_from", source, "--adapter.prompt_tokens", 6, "--train.steps", 4)
    assert gpc("train", tiny_recipe, "--run.dir", tmp_path / "alone", *words) == 0
    words = (*words, "--run.dir", tmp_path / "both", "--engine.zero_stage", 3)
    done = on_ranks(2, "train", tiny_recipe, *words)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "alone"), rel=2e-4)
    assert done.stderr.count("): prompt (4 of 6 tokens), cell, head") == 1


@pytest.mark.slow
def test_trials_of_a_pack_may_start_from_different_adapters(
    tiny_recipe: Path, source: Path, tmp_path: Path
) -> None:
    starts = {"from": {"adapter.init_from": str(source)}, "fresh": {}}
    runs = {
        name: [str(tiny_recipe), {"run.dir": str(tmp_path / "packed" / name), **settings}]
        for name, settings in starts.items()
    }
    done = call_on_ranks(1, run_pack, {"runs": runs, "first": list(runs), "then": []})
    assert done.returncode == 0, done.stderr
    for name, settings in starts.items():
        words = [word for key, value in settings.items() for word in (f"--{key}", value)]
        assert gpc("train", tiny_recipe, "--run.dir", tmp_path / name, *words) == 0
        assert losses(tmp_path / "packed" / name) == pytest.approx(losses(tmp_path / name), rel=1e-3)
        assert (read_card(tmp_path / "packed" / name / "adapter").origin is None) == (name == "fresh")


def task(name: str, **keys: Any) -> Task:
    return make_task(TaskConfig(name=name, **keys), DataConfig())


FILMS = {"text": ["review"], "labels": ["negative", "positive"]}
BACKWARDS = {"text": ["review"], "labels": ["positive", "negative"]}


@pytest.mark.parametrize(
    ("mine", "theirs", "alike"),
    [
        (("rte", {}), ("rte", {}), True),
        (("rte", {}), ("cb", {}), False),
        (("boolq", {}), ("multirc", {}), True),
        (("boolq", {}), ("wic", {}), False),  # `false` and `true` of both, but they mean yes and same
        (("sst2", {}), ("films", FILMS), True),
        (("sst2", {}), ("films", BACKWARDS), False),
        (("copa", {}), ("copa", {}), True),
        (("copa", {}), ("record", {}), False),
        (("copa", {}), ("stars", {"kind": "regression", "text": ["review"]}), False),
    ],
    ids=str,
)
def test_heads_answer_alike_with_the_same_labels_in_the_same_order(
    mine: tuple[str, dict[str, Any]], theirs: tuple[str, dict[str, Any]], alike: bool
) -> None:
    assert answers_alike(task(mine[0], **mine[1]), card_of(*theirs)) is alike


def test_a_card_without_a_task_that_can_be_made_has_other_labels() -> None:
    assert not answers_alike(task("rte"), card_of("no-such-task"))
    card = card_of("rte")
    card.task.clear()
    assert not answers_alike(task("rte"), card)


def card_of(name: str, keys: dict[str, Any] | None = None) -> AdapterCard:
    """A card of which only its task is read."""
    tree = config.build({}).dump()
    described: Any = {"task": tree["task"] | {"name": name} | (keys or {}), "data": tree["data"]}
    return AdapterCard(adapter=None, shape=None, outputs=2, encoder=None, task=described)  # type: ignore[arg-type]
