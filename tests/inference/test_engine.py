"""On which ranks and at which stage an adapter is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpc_dist import config
from gpc_dist.distributed import launch
from gpc_dist.errors import EXIT_USAGE, UserError
from gpc_dist.inference import engine
from gpc_dist.inference.engine import engine_of, measured_config
from gpc_dist.study import measure
from gpc_dist.study.spec import OfficialConfig
from tests.conftest import gpc


def run_with(place: Path, **keys: Any) -> Path:
    """The folder of a run with these keys of the engine, as far as it matters here; returns that of its adapter."""
    tree = config.apply({}, {f"engine.{key}": value for key, value in keys.items()}).dump()
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(yaml.safe_dump(tree))
    (place / "status.json").write_text("{}")
    return place / "adapter"


SHARDED = {"ranks": 4, "zero_stage": 3, "offload_param": "cpu", "dtype": "bf16"}


def test_an_adapter_has_the_engine_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = run_with(tmp_path / "run", **SHARDED, compile=False, activation_checkpointing=True)
    found = engine_of(adapter, {})
    assert {key: found[key] for key in SHARDED} == SHARDED
    assert "activation_checkpointing" not in found
    monkeypatch.chdir(tmp_path / "run")
    assert engine_of(Path("adapter"), {}) == found
    assert engine_of(Path("../run/adapter"), {}) == found


def test_another_stage_is_chosen_without_what_belongs_to_the_run_s(tmp_path: Path) -> None:
    adapter = run_with(tmp_path / "run", **SHARDED)
    settings = {"engine.zero_stage": "0"}
    built = config.build({"engine": engine_of(adapter, settings)}, settings).engine
    assert (built.zero_stage, built.offload_param, built.dtype) == (0, "none", "bf16")


def test_an_adapter_that_stands_by_itself_has_no_engine(tmp_path: Path) -> None:
    adapter = run_with(tmp_path / "run", **SHARDED)
    assert engine_of(tmp_path / "run" / "copy", {}) == {}
    assert engine_of(tmp_path / "other" / "adapter", {}) == {}
    (tmp_path / "run" / "status.json").unlink()  # whose configuration that is is not known
    assert engine_of(adapter, {}) == {}


def test_a_run_that_others_wrote_chooses_no_folder(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.json"
    offload = {"device": "nvme", "nvme_path": str(tmp_path / "theirs")}
    theirs.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": offload}}))
    adapter = run_with(tmp_path / "run", ds_config=str(theirs))
    theirs.unlink()  # it stayed on their machine
    found = engine_of(adapter, {})
    assert found["offload_param"] == "cpu"
    assert not {"nvme_path", "ds_config"} & found.keys()


@pytest.mark.parametrize(
    "text", ["engine: 3", "engine: {ranks: many}", "- 1", "engine: {zero_stage: 0, offload_param: cpu}"]
)
def test_a_damaged_configuration_is_one_line(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = run_with(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(text)
    assert gpc("evaluate", adapter) == EXIT_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/run/config.yaml is not" in line


@pytest.mark.parametrize(
    ("given", "gpus", "started"), [({}, 0, 2), ({}, 3, 3), ({}, 8, 4), ({"engine.ranks": "7"}, 0, 7)]
)
def test_a_command_starts_the_ranks_of_the_run_as_far_as_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], gpus: int, started: int
) -> None:
    adapter = run_with(tmp_path / "run", **SHARDED)
    monkeypatch.setattr(launch, "_cores", lambda: 2)
    monkeypatch.setattr(launch, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(launch, "start_ranks", lambda _, ranks: 100 + ranks)
    assert engine.run_as_ranks(adapter, given, ["evaluate", str(adapter)]) == 100 + started
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    assert gpc("evaluate", adapter, *words) == 100 + started
    assert gpc("inspect", adapter, *words) == 100 + started


def test_trials_are_measured_on_their_own_engine_or_on_the_chosen_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded = [run_with(tmp_path / name, ranks=2, zero_stage=3).parent for name in ("a", "b")]
    whole = run_with(tmp_path / "c", ranks=2, zero_stage=1).parent
    done = run_with(tmp_path / "d", ranks=2, zero_stage=1).parent
    (done / "official.json").touch()
    started = []

    def start(command: list[str], ranks: int) -> int:
        started.append((command[-2:] if str(sharded[0]) in command else command[-1:], ranks))
        return 0

    monkeypatch.setattr(launch, "_cores", lambda: 9)
    monkeypatch.setattr(launch, "visible_gpus", lambda: 0)
    monkeypatch.setattr(measure.launch, "start_ranks", start)
    trials = [sharded[0], whole, sharded[1], done]
    assert measure.measure_official(trials, OfficialConfig()) == 0
    assert started == [([str(each) for each in sharded], 2), ([str(whole)], 2)]
    started.clear()
    assert measure.measure_official(trials, OfficialConfig(ranks=5, zero_stage=3)) == 0
    assert [ranks for _, ranks in started] == [5]  # all alike, so one start


def test_what_cannot_be_measured_together_is_refused_before_a_study_begins(tmp_path: Path) -> None:
    tree = config.apply({}, {"engine.zero_stage": 3, "data.limit_eval": 5}).dump()
    found = measured_config(tree, OfficialConfig().settings)
    assert (found.engine.zero_stage, found.data.limit_eval) == (3, None)
    with pytest.raises(UserError, match="engine.offload_param needs engine.zero_stage 3"):
        measured_config(tree, OfficialConfig(zero_stage=1, offload_param="cpu").settings)
    tuned = config.apply({}, {"adapter.method": "fine-tuning", "engine.zero_stage": 2}).dump()
    assert measured_config(tuned, OfficialConfig(zero_stage=3).settings).engine.zero_stage == 2
