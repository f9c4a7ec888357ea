"""Runs in a pack give what each gives alone, whoever joins, leaves or fails beside it, and whatever its task."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gpc_dist import config
from gpc_dist.distributed import checkpoint
from gpc_dist.distributed.world import World
from gpc_dist.runs.folder import RunFolder
from gpc_dist.training.pack import Pack
from tests.conftest import gpc, losses
from tests.processes import call_on_ranks, on_ranks
from tests.training.packed import run_pack

pytestmark = pytest.mark.slow

RUNS: dict[str, dict[str, str]] = {
    "residual": {"train.steps": "50", "adapter.cell": "residual", "train.lr": "0.02"},
    "prompt": {
        "train.steps": "24",
        "adapter.method": "prompt-tuning",
        "train.lr": "0.05",
        "train.schedule": "constant",
        "run.seed": "3",
        "train.batch_size": "5",
    },
    "gated": {
        "train.steps": "30",
        "adapter.cell": "gated",
        "adapter.cell_rank": "3",
        "train.clip_norm": "0.1",
        "train.weight_decay": "0.3",
        "train.eval_every": "5",
        "run.seed": "1",
    },
    "per-layer": {
        "train.steps": "20",
        "adapter.cell_per_layer": "true",
        "adapter.prompt_init": "uniform",
        "data.limit_train": "30",
        "train.warmup": "0.5",
        "train.optimizer": "adafactor",
        "train.class_weights": "balanced",
    },
    "probe": {"train.steps": "25", "adapter.method": "linear-probe", "train.lr": "0.05", "run.seed": "2"},
}
"""Runs of one task that differ in all else that the lanes of a pack may."""

CHOICE = {
    "task.name": "which",
    "task.kind": "choice",
    "task.text": "[]",
    "task.label": "right",
    "task.choices": '["{first}", "{second}"]',
}
OTHERS: dict[str, dict[str, str]] = {
    "number": {
        "task.name": "words",
        "task.kind": "regression",
        "task.label": "words",
        "data.max_length": "12",
        "train.steps": "20",
        "train.batch_size": "4",
        "train.eval_every": "4",
        "train.schedule": "linear",
    },
    "choice": CHOICE | {"data.holdout": "0.3", "train.steps": "16", "train.batch_size": "3"},
    "probed": CHOICE | {"adapter.method": "linear-probe", "train.steps": "12"},
}
"""Runs of other tasks, on other data."""


def settings(name: str, folder: Path, zero_stage: int) -> dict[str, str]:
    return RUNS[name] | {
        "run.dir": str(folder / name),
        "engine.zero_stage": str(zero_stage),
        "train.eval_every": RUNS[name].get("train.eval_every", "10"),
    }


def plan(recipe: Path, folder: Path, zero_stage: int) -> dict[str, Any]:
    """Two runs begin; two join beside them, one of them without a prompt; one takes the lane of the one that ends."""
    return {
        "runs": {name: [str(recipe), settings(name, folder, zero_stage)] for name in RUNS},
        "first": ["residual", "prompt"],
        "then": [
            {"after": "residual", "step": 10, "join": ["gated", "probe"]},
            {"after": "prompt", "step": 24, "join": ["per-layer"]},
        ],
    }


@pytest.fixture(scope="module", params=[(1, 0), (2, 2), (2, 3)], ids=str)
def both(
    request: pytest.FixtureRequest, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Folders of the runs packed, and alone."""
    ranks, stage = request.param
    packed, alone = tmp_path_factory.mktemp("packed"), tmp_path_factory.mktemp("alone")
    done = call_on_ranks(ranks, run_pack, plan(tiny_recipe, packed, stage))
    assert done.returncode == 0, done.stderr
    for name in RUNS:
        done = on_ranks(ranks, "train", tiny_recipe, *words_of(settings(name, alone, stage)))
        assert done.returncode == 0, done.stderr
    return packed, alone


def words_of(settings: dict[str, str]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", value)]


def run_alone(recipe: Path, folder: Path, **settings: str) -> dict[int, float]:
    """Losses of a run in this process."""
    assert gpc("train", recipe, "--run.dir", folder, *words_of(settings)) == 0
    return losses(folder)


@pytest.mark.parametrize("name", RUNS)
def test_a_packed_run_is_the_run_alone(both: tuple[Path, Path], name: str) -> None:
    packed, alone = both
    check_same(packed / name, alone / name, int(RUNS[name]["train.steps"]))


def test_runs_of_several_tasks_in_a_pack_are_those_runs_alone(
    tiny_recipe: Path, other_data: Path, tmp_path: Path
) -> None:
    """Two have the lanes of a run of the first task beside them; one joins when another has ended."""
    data = {"data.path": str(other_data)}
    given = {name: OTHERS[name] | data | {"engine.zero_stage": "3"} for name in OTHERS}
    runs = {
        name: [str(tiny_recipe), {"run.dir": str(tmp_path / name), **each}]
        for name, each in (given | {"cats": settings("residual", tmp_path, 3)}).items()
    }
    then = [{"after": "number", "step": 20, "join": ["choice"]}]
    done = call_on_ranks(2, run_pack, {"runs": runs, "first": ["cats", "number", "probed"], "then": then})
    assert done.returncode == 0, done.stderr
    for name, each in given.items():
        alone = tmp_path / f"{name}-alone"
        done = on_ranks(2, "train", tiny_recipe, "--run.dir", alone, *words_of(each))
        assert done.returncode == 0, done.stderr
        check_same(tmp_path / name, alone, int(each["train.steps"]))
        described = [json.loads((folder / "facts.json").read_text()) for folder in (tmp_path / name, alone)]
        assert described[0]["dataset"] == described[1]["dataset"]
        cards = [
            json.loads((folder / "adapter" / "adapter_config.json").read_text())
            for folder in (tmp_path / name, alone)
        ]
        assert cards[0]["task"] == cards[1]["task"]


def check_same(packed: Path, alone: Path, steps: int) -> None:
    """Assert that a run in a pack gave what the same run alone did."""
    mine, theirs = losses(packed), losses(alone)
    assert mine.keys() == theirs.keys()
    assert len(mine) == steps
    torch.testing.assert_close(list(mine.values()), list(theirs.values()), rtol=1e-3, atol=1e-5)
    results = [json.loads((folder / "result.json").read_text()) for folder in (packed, alone)]
    assert results[0]["metrics"]["last"] == pytest.approx(results[1]["metrics"]["last"], rel=1e-3, abs=1e-4)
    for key in (
        "task",
        "main_metric",
        "selected_on",
        "steps",
        "seed",
        "trainable_parameters",
        "world_size",
        "zero_stage",
        "majority_baseline",
    ):
        assert results[0][key] == results[1][key]
    assert (packed / "adapter" / "adapter_config.json").exists()
    assert json.loads((packed / "status.json").read_text())["state"] == "finished"
    assert last_adapter(packed).keys() == last_adapter(alone).keys()
    for key, value in last_adapter(packed).items():
        if results[0]["task"] == "which" and value.numel() == 1:
            continue  # the bias, which all candidates share: its gradient is rounding and nothing else
        torch.testing.assert_close(value, last_adapter(alone)[key], rtol=1e-2, atol=1e-4)


def last_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Parameters after the last step."""
    tensors = load_file(max((folder / "checkpoints").glob("step-*")) / "trained.safetensors")
    return {key: value for key, value in tensors.items() if key.startswith("param/")}


def test_a_lane_that_fails_fails_alone(tiny_recipe: Path, tmp_path: Path) -> None:
    runs = {
        "good": [str(tiny_recipe), {"run.dir": str(tmp_path / "good")}],
        "bad": [
            str(tiny_recipe),
            {"run.dir": str(tmp_path / "bad"), "train.lr": "1e30", "train.clip_norm": "null"},
        ],
    }
    events = run_pack({"runs": runs, "first": ["bad", "good"], "then": []})
    (failed,) = [event for event in events if event.failure]
    assert failed.name == "bad"
    assert "the loss was not finite" in failed.failure
    assert json.loads((tmp_path / "bad" / "status.json").read_text())["state"] == "failed"
    mine, theirs = losses(tmp_path / "good"), run_alone(tiny_recipe, tmp_path / "alone")
    torch.testing.assert_close(list(mine.values()), list(theirs.values()), rtol=1e-4, atol=1e-6)


def test_a_pack_learns_from_and_selects_on_the_parts_a_run_alone_does(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    held_out = {"data.holdout": "0.2", "train.steps": "4"}
    runs = {
        name: [str(tiny_recipe), held_out | {"run.dir": str(tmp_path / name), "run.seed": seed}]
        for name, seed in (("one", "0"), ("two", "1"))
    }
    run_pack({"runs": runs, "first": ["one", "two"], "then": []})
    theirs = run_alone(tiny_recipe, tmp_path / "alone", **held_out)
    facts = [
        json.loads((tmp_path / name / "facts.json").read_text())["dataset"]
        for name in ("one", "two", "alone")
    ]
    assert facts[0] == facts[1] == facts[2]
    assert facts[0]["validation_examples"] == 14
    mine = losses(tmp_path / "one")
    torch.testing.assert_close(list(mine.values()), list(theirs.values()), rtol=1e-4, atol=1e-6)


def test_a_run_that_left_goes_on_alone_and_back_in_a_pack(tiny_recipe: Path, tmp_path: Path) -> None:
    def run(name: str, **more: str) -> list[Any]:
        return [str(tiny_recipe), {"run.dir": str(tmp_path / name), "train.steps": "24", **more}]

    plan = {
        "runs": {"mine": run("mine"), "other": run("other", **{"run.seed": "5"})},
        "first": ["mine", "other"],
        "then": [{"after": "mine", "step": 8, "leave": ["mine"]}],
    }
    run_pack(plan)
    assert json.loads((tmp_path / "mine" / "status.json").read_text())["state"] == "stopped"
    assert json.loads((tmp_path / "mine" / "result.json").read_text())["steps"] == 8
    more = run_pack(plan | {"first": ["mine"], "then": []})
    assert [event.step for event in more] == [12, 16, 20, 24]
    mine, theirs = (
        losses(tmp_path / "mine"),
        run_alone(tiny_recipe, tmp_path / "alone", **{"train.steps": "24"}),
    )
    assert sorted(mine) == list(range(1, 25))
    torch.testing.assert_close(list(mine.values()), list(theirs.values()), rtol=1e-4, atol=1e-6)


def test_a_run_that_starts_from_another_forgets_its_own_course(tiny_recipe: Path, tmp_path: Path) -> None:
    """It was further on: what it had saved would be taken for its newest state, should it be cut off now."""
    folders = {name: RunFolder(tmp_path / name) for name in ("good", "bad")}
    configs = {
        name: config.load(
            str(tiny_recipe), {"run.dir": str(folder), "train.steps": "12", "train.eval_every": "4"}
        )
        for name, folder in folders.items()
    }
    pack = Pack(configs["good"], World(0, 1, 0, torch.device("cpu")))

    def train(name: str, step: int) -> None:
        pack.add(name, configs[name], ["gpc-dist"])
        while not any(event.step == step for event in pack.advance([name])):
            pass
        pack.leave(name)

    train("good", 4)
    train("bad", 8)
    (saved,) = folders["good"].checkpoints.iterdir()
    pack.add("bad", configs["bad"], ["gpc-dist"], saved)
    assert [path.name for path in folders["bad"].checkpoints.iterdir()] == ["step-00000004"]
    mine, theirs = checkpoint.load(folders["bad"].checkpoints / saved.name), checkpoint.load(saved)
    assert mine.state == theirs.state
    torch.testing.assert_close((mine.tensors, mine.rng), (theirs.tensors, theirs.rng), rtol=0, atol=0)


def test_a_pack_lets_go_of_the_data_of_tasks_that_have_left(
    tiny_recipe: Path, other_data: Path, tmp_path: Path
) -> None:
    cats = config.load(str(tiny_recipe), {"run.dir": str(tmp_path / "cats")})
    again = config.load(str(tiny_recipe), {"run.dir": str(tmp_path / "again"), "run.seed": "1"})
    given = OTHERS["number"] | {"data.path": str(other_data), "run.dir": str(tmp_path / "number")}
    number = config.load(str(tiny_recipe), given)
    pack = Pack(cats, World(0, 1, 0, torch.device("cpu")))
    pack.add("cats", cats, ["gpc-dist"])
    read = weakref.ref(pack._runs["cats"].training)
    pack.leave("cats")
    pack.add("again", again, ["gpc-dist"])
    assert pack._runs["again"].training is read()  # not read twice, one after the other
    pack.add("number", number, ["gpc-dist"])
    pack.leave("again")
    gc.collect()
    assert read() is not None
    pack.add(
        "number too",
        number.model_copy(update={"run": number.run.model_copy(update={"dir": tmp_path / "too"})}),
        ["gpc-dist"],
    )
    gc.collect()
    assert read() is None


@pytest.mark.parametrize(("heard", "steps"), [(0, [4, 8]), (4, [8]), (None, [8])])
def test_an_evaluation_that_nobody_heard_of_is_told_again(
    tiny_recipe: Path, tmp_path: Path, heard: int | None, steps: list[int]
) -> None:
    """Its process was killed before it could report it."""
    given = {"run.dir": str(tmp_path / "run"), "train.steps": "12", "train.eval_every": "4"}
    settings = config.load(str(tiny_recipe), given)
    pack = Pack(settings, World(0, 1, 0, torch.device("cpu")))
    pack.add("run", settings, ["gpc-dist"])
    (lost,) = pack.advance(["run"])
    pack.leave("run")
    pack.add("run", settings, ["gpc-dist"], heard=heard)
    events = [event for _ in steps for event in pack.advance(["run"])]
    assert [event.step for event in events] == steps
    assert (lost in events) == (heard == 0)
