"""Adapters measured on the official split: the same decisions as one by one, whatever they share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gpc_dist.config import EngineConfig
from gpc_dist.distributed.world import alone
from gpc_dist.inference import official
from gpc_dist.inference.adapters import Predictor, open_adapter
from gpc_dist.inference.official import evaluate_official
from gpc_dist.tasks import judged, metrics
from gpc_dist.tasks.example import Example
from tests.conftest import gpc

ALONE = alone(EngineConfig(device="cpu"))


@pytest.fixture(scope="module")
def runs(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("runs")
    found = []
    for number, method in enumerate(("gpc", "fine-tuning", "linear-probe")):
        words = ("--adapter.method", method, "--run.dir", place / method, "--data.limit_eval", 5 + number)
        assert gpc("train", tiny_recipe, *words, "--data.holdout", 0.2) == 0
        found.append(place / method)
    return found


def test_each_adapter_is_measured_once_on_the_whole_split(runs: list[Path]) -> None:
    order = [runs[0], runs[2], runs[1], runs[0]]
    evaluate_official(order, "official.json", {}, ALONE)
    for run in runs:
        found = json.loads((run / "official.json").read_text())
        predictor = Predictor(run / "adapter", {"engine.device": "cpu"})
        task = predictor.session.task
        examples = task.read("validation")
        rows = [{"text": example.rows[0][0]} for example in examples]
        labels = [task.labels[each["decision"]] for each in found["examples"]]
        assert labels == [each.value for each in predictor.predict(rows)]
        right = sum(each["target"] == each["decision"] for each in found["examples"])
        assert len(found["examples"]) == 23
        assert found["metrics"]["accuracy"] == pytest.approx(right / 23)
        assert found["metric"] == task.main_metric
        # the classes of all 70 training rows are equally frequent, and then the first one is taken
        first = sum(example.target == 0 for example in examples)
        assert found["majority_baseline"]["accuracy"] == pytest.approx(first / 23)
    before = (runs[0] / "official.json").stat().st_mtime_ns
    evaluate_official(runs, "official.json", {}, ALONE)
    assert (runs[0] / "official.json").stat().st_mtime_ns == before


def test_adapters_of_several_tasks_share_an_encoder(
    runs: list[Path], tiny_recipe: Path, other_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = ("--task.name", "words", "--task.kind", "regression", "--task.label", "words")
    words = ("--data.path", other_data, "--data.max_length", 12, "--run.dir", tmp_path)
    assert gpc("train", tiny_recipe, *task, *words) == 0
    opened = []
    monkeypatch.setattr(official, "open_adapter", lambda *given: opened.append(given) or open_adapter(*given))
    evaluate_official([runs[0], tmp_path], "shared.json", {}, ALONE)
    assert len(opened) == 1
    evaluate_official([tmp_path], "alone.json", {}, ALONE)
    together, alone = (json.loads((tmp_path / name).read_text()) for name in ("shared.json", "alone.json"))
    assert together.pop("metrics") == pytest.approx(alone.pop("metrics"))
    assert [each.pop("decision") for each in together["examples"]] == pytest.approx(
        [each.pop("decision") for each in alone["examples"]]
    )
    assert together == alone


def test_examples_come_back_as_far_as_scoring_needs_them() -> None:
    meta = {"candidates": ("red b", "b"), "answers": ("b",), "text": "left out"}
    examples = [
        Example(0, (("text", None),), 1, group=(3, 0), source=3),
        Example(1, (("text", None),), 0, group=(3, 1), source=3),
        Example(2, (("text", None),), (1,), source="other", meta=meta),
    ]
    again = judged.read_examples(json.loads(json.dumps(judged.describe(examples, [1, 1, 0]))))
    assert [(e.id, e.target, e.group, e.source) for e in again] == [
        (0, 1, 0, 0),
        (1, 0, 1, 0),
        (2, (1,), None, 1),
    ]
    # one of two words is right: F1 is 2 / 3
    for metric, scores in ((metrics.record_f1, [2 / 3, 1]), (metrics.accuracy, [0, 1])):
        assert [metric(again[2:], np.array([decision])) for decision in (0, 1)] == pytest.approx(scores)
    assert "left out" not in json.dumps(judged.describe(examples, [1, 1, 0]))
