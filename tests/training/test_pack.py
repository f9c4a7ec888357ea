"""Runs in a pack give what each gives alone, whoever joins, leaves or fails beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import command, losses
from tests.training.packed import run_pack

RUNS: dict[str, dict[str, str]] = {
    "residual": {"train.steps": "100", "adapter.cell": "residual", "train.lr": "0.02"},
    "prompt": {
        "train.steps": "48",
        "adapter.method": "prompt-tuning",
        "train.lr": "0.05",
        "train.schedule": "constant",
        "run.seed": "3",
        "train.batch_size": "5",
    },
    "gated": {
        "train.steps": "60",
        "adapter.cell": "gated",
        "adapter.cell_rank": "3",
        "train.clip_norm": "0.1",
        "train.weight_decay": "0.3",
        "train.eval_every": "10",
        "run.seed": "1",
    },
    "per-layer": {
        "train.steps": "40",
        "adapter.cell_per_layer": "true",
        "adapter.prompt_init": "uniform",
        "data.limit_train": "30",
        "train.warmup": "0.5",
        "train.optimizer": "adafactor",
    },
}
"""Runs that differ in all that the lanes of a pack may."""


def settings(name: str, folder: Path, zero_stage: int) -> dict[str, str]:
    return RUNS[name] | {
        "run.dir": str(folder / name),
        "engine.zero_stage": str(zero_stage),
        "train.eval_every": RUNS[name].get("train.eval_every", "20"),
    }


def plan(recipe: Path, folder: Path, zero_stage: int) -> dict[str, Any]:
    """Two runs begin; one joins beside them, one takes the lane of the one that ends."""
    return {
        "runs": {name: [str(recipe), settings(name, folder, zero_stage)] for name in RUNS},
        "first": ["residual", "prompt"],
        "then": [
            {"after": "residual", "step": 20, "join": ["gated"]},
            {"after": "prompt", "step": 48, "join": ["per-layer"]},
        ],
    }


@pytest.fixture(scope="module", params=[(1, 0), (2, 2), (2, 3)], ids=str)
def both(
    request: pytest.FixtureRequest, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Folders of the runs packed, and alone."""
    ranks, stage = request.param
    packed, alone = tmp_path_factory.mktemp("packed"), tmp_path_factory.mktemp("alone")
    file = packed / "plan.json"
    file.write_text(json.dumps(plan(tiny_recipe, packed, stage)))
    script = (
        "import sys; from gpc_dist.engine.launch import start_ranks; "
        f"sys.exit(start_ranks([sys.executable, '-m', 'tests.training.packed', {str(file)!r}], {ranks}, True))"
    )
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    for name in RUNS:
        words = [word for key, value in settings(name, alone, stage).items() for word in (f"--{key}", value)]
        done = command("train", tiny_recipe, *words, "--engine.ranks", ranks)
        assert done.returncode == 0, done.stderr
    return packed, alone


@pytest.mark.parametrize("name", RUNS)
def test_a_packed_run_is_the_run_alone(both: tuple[Path, Path], name: str) -> None:
    packed, alone = (folder / name for folder in both)
    mine, theirs = losses(packed), losses(alone)
    assert mine.keys() == theirs.keys()
    assert len(mine) == int(RUNS[name]["train.steps"])
    torch.testing.assert_close(list(mine.values()), list(theirs.values()), rtol=1e-3, atol=1e-5)
    results = [json.loads((folder / "result.json").read_text()) for folder in (packed, alone)]
    assert results[0]["metrics"]["last"] == pytest.approx(results[1]["metrics"]["last"], rel=1e-3, abs=1e-4)
    for key in ("steps", "seed", "trainable_parameters", "world_size", "zero_stage", "majority_baseline"):
        assert results[0][key] == results[1][key]
    assert (packed / "adapter" / "adapter_config.json").exists()
    assert json.loads((packed / "status.json").read_text())["state"] == "finished"
    assert last_adapter(packed).keys() == last_adapter(alone).keys()
    for key, value in last_adapter(packed).items():
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
    done = command("train", tiny_recipe, "--run.dir", tmp_path / "alone")
    assert done.returncode == 0
    mine, theirs = losses(tmp_path / "good"), losses(tmp_path / "alone")
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
    words = [word for key, value in held_out.items() for word in (f"--{key}", value)]
    assert command("train", tiny_recipe, *words, "--run.dir", tmp_path / "alone").returncode == 0
    facts = [
        json.loads((tmp_path / name / "facts.json").read_text())["dataset"]
        for name in ("one", "two", "alone")
    ]
    assert facts[0] == facts[1] == facts[2]
    assert facts[0]["validation_examples"] == 14
    torch.testing.assert_close(
        list(losses(tmp_path / "one").values()),
        list(losses(tmp_path / "alone").values()),
        rtol=1e-4,
        atol=1e-6,
    )


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
    done = command("train", tiny_recipe, "--run.dir", tmp_path / "alone", "--train.steps", 24)
    assert done.returncode == 0
    mine, theirs = losses(tmp_path / "mine"), losses(tmp_path / "alone")
    assert sorted(mine) == list(range(1, 25))
    torch.testing.assert_close(list(mine.values()), list(theirs.values()), rtol=1e-4, atol=1e-6)
