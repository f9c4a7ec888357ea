"""Adapters in use at stage 3 on two ranks: the figures are those of one rank with the whole encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from gpc_dist.config import EngineConfig
from gpc_dist.distributed.world import alone
from gpc_dist.inference import official
from gpc_dist.inference.adapters import Predictor
from gpc_dist.inference.serving import SETTINGS, _load_pyfunc
from gpc_dist.study.measure import measure_official
from gpc_dist.study.spec import OfficialConfig
from tests.conftest import gpc
from tests.processes import call_on_ranks, on_ranks, start_call, start_on_ranks

pytestmark = pytest.mark.slow

KINDS = {
    "gated": ("--adapter.cell", "gated"),
    "late": ("--adapter.first_layer", 2),
    "probe": ("--adapter.method", "linear-probe"),
    "mixing-probe": ("--adapter.method", "linear-probe", "--adapter.head_layers", "mix"),
    "fine-tuning": ("--adapter.method", "fine-tuning"),
}
SHARDED = ("--engine.zero_stage", 3)
CLOSE = 2e-4
"""Relative; ranks sum in another order."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> dict[str, Path]:
    """Finished runs on one rank with the whole encoder."""
    place = tmp_path_factory.mktemp("runs")
    for kind, words in KINDS.items():
        assert gpc("train", tiny_recipe, "--run.dir", place / kind, *words) == 0
    return {kind: place / kind for kind in KINDS}


@pytest.fixture(autouse=True)
def _no_text_states_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are computed at stage 3, too."""
    monkeypatch.setenv("GPC_DIST_CACHE", str(tmp_path / "states"))


def assert_close(found: Any, expected: Any, rel: float = CLOSE) -> None:
    """Whether trees of JSON are equal but for the rounding of floats."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value, rel)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, rel)
    else:
        assert found == (pytest.approx(expected, rel=rel) if isinstance(expected, float) else expected)


def last_line(text: str) -> Any:
    return json.loads(text.splitlines()[-1])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fine-tuning"])
def test_evaluate(runs: dict[str, Path], kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpc("evaluate", runs[kind] / "adapter") == 0
    whole = last_line(capsys.readouterr().out)
    done = on_ranks(2, "evaluate", runs[kind] / "adapter", *SHARDED, "--train.eval_batch_tokens", 64)
    assert done.returncode == 0, done.stderr
    sharded = last_line(done.stdout)
    assert sharded["examples"] == 23
    assert_close(sharded, whole)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fine-tuning"])
def test_predict(runs: dict[str, Path], kind: str, tiny_data: Path, tmp_path: Path) -> None:
    words = ("--input", tiny_data / "validation.jsonl", "--output")
    assert gpc("predict", runs[kind] / "adapter", *words, tmp_path / "whole.jsonl") == 0
    done = on_ranks(2, "predict", runs[kind] / "adapter", *words, tmp_path / "sharded.jsonl", *SHARDED)
    assert done.returncode == 0, done.stderr
    whole, sharded = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in ("whole", "sharded")
    )
    assert len(whole) == 23
    assert_close(sharded, whole)


@pytest.mark.parametrize("examples", [23, 1])
def test_inspect(runs: dict[str, Path], tmp_path: Path, examples: int) -> None:
    """Two adapters after each other; with one example, one rank has none."""
    words = ("inspect", runs["gated"] / "adapter", runs["late"] / "adapter", "--examples", examples, "--json")
    assert gpc(*words, tmp_path / "whole.json") == 0
    done = on_ranks(2, *words, tmp_path / "sharded.json", "--png", tmp_path / "both.png", *SHARDED)
    assert done.returncode == 0, done.stderr
    whole, sharded = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "sharded"))
    late = sharded["adapters"][str(runs["late"] / "adapter")]
    assert [layer["layer"] for layer in late] == [2, 3]
    assert_close(sharded, whole, rel=1e-3)
    assert (tmp_path / "both.png").stat().st_size > 5000
    assert "cosine with p_0" in done.stdout


def predict(adapter: Path, texts: Sequence[str], overrides: Mapping[str, str]) -> None:
    """On a rank."""
    predictor = Predictor(adapter, overrides)
    for part in (texts[:1], texts[1:]):
        found = predictor.predict([{"text": text} for text in part])
        print(json.dumps([[each.value, each.probabilities] for each in found]))


def test_a_predictor_on_ranks_gives_all_of_them_the_predictions(runs: dict[str, Path]) -> None:
    texts = ["the cat sleeps", "a bird sings in the old garden today", "never"]
    overrides = {"engine.device": "cpu"}
    found = Predictor(runs["late"] / "adapter", overrides).predict([{"text": text} for text in texts])
    whole = [[each.value, each.probabilities] for each in found]
    for ranks, offload in ((2, "none"), (1, "cpu")):
        sharded = overrides | {"engine.zero_stage": "3", "engine.offload_param": offload}
        for rank in start_on_ranks(ranks, predict, runs["late"] / "adapter", texts, sharded):
            assert rank.wait() == 0, rank.stderr
            said = [each for line in rank.stdout.splitlines() for each in json.loads(line)]
            assert_close(said, whole)


def serve(adapter: Path, texts: Sequence[str]) -> None:
    """In a process of its own, as MLflow does."""
    print(_load_pyfunc(str(adapter)).predict(list(texts)).to_json(orient="values", double_precision=15))


def test_a_served_model_takes_settings_from_the_environment(runs: dict[str, Path]) -> None:
    offloaded = "--engine.zero_stage 3 --engine.offload_param cpu"
    found = []
    for settings in ("", offloaded, f"{offloaded} --engine.no_such_key 1"):
        served = start_call(
            serve, runs["gated"] / "adapter", ["the cat sleeps", "never"], **{SETTINGS: settings}
        )
        found.append((served.wait(), served.stdout, served.stderr))
    assert_close(last_line(found[1][1]), last_line(found[0][1]))
    assert found[2][0] != 0
    assert "unknown key 'engine.no_such_key'" in found[2][2]


# -- official scores -----------------------------------------------------------------------------------------


def scores(runs: dict[str, Path], name: str) -> dict[str, Any]:
    return {kind: json.loads((run / name).read_text()) for kind, run in runs.items()}


@pytest.fixture(scope="module")
def expected(runs: dict[str, Path]) -> dict[str, Any]:
    official.evaluate_official(list(runs.values()), "whole.json", {}, alone(EngineConfig(device="cpu")))
    return scores(runs, "whole.json")


def test_official_scores(runs: dict[str, Path], expected: dict[str, Any]) -> None:
    """An encoder that was trained is measured at the stage of its own run, beside the others."""
    words = ["chosen.json", json.dumps({"engine.zero_stage": 3}), *map(str, runs.values())]
    done = call_on_ranks(2, official.main, words)
    assert done.returncode == 0, done.stderr
    assert_close(scores(runs, "chosen.json"), expected)


def test_a_study_measures_on_the_ranks_and_at_the_stage_of_its_runs(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    trained = {}
    for kind in ("gated", "late"):
        engine = ("--engine.ranks", 2, *SHARDED, "--run.dir", tmp_path / kind)
        done = on_ranks(2, "train", tiny_recipe, *engine, *KINDS[kind])
        assert done.returncode == 0, done.stderr
        trained[kind] = tmp_path / kind
    official.evaluate_official(
        list(trained.values()), "whole.json", {"engine.zero_stage": 0}, alone(EngineConfig(device="cpu"))
    )
    measured = start_call(measure_official, list(trained.values()), OfficialConfig())
    assert measured.wait() == 0, measured.stderr
    assert_close(scores(trained, "official.json"), scores(trained, "whole.json"))
