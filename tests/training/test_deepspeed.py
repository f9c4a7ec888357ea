"""Runs with a DeepSpeed JSON of the user's, and with what DeepSpeed has for frozen weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpc_dist import cli
from tests.conftest import losses
from tests.processes import call_on_ranks, on_ranks

pytestmark = pytest.mark.slow

MINE: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "cpu"},
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 20000,
    },
    "train_micro_batch_size_per_gpu": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = on_ranks(1, "train", tiny_recipe, "--run.dir", folder)
    assert done.returncode == 0, done.stderr
    assert not (folder / "ds_config.json").exists()  # DeepSpeed has no part in it
    return losses(folder)


def test_a_users_file_is_what_deepspeed_is_given(
    tiny_recipe: Path, tmp_path: Path, whole: dict[int, float]
) -> None:
    """On ranks of the `deepspeed` launcher, which puts a word before the command's."""
    folder, file = tmp_path / "run", tmp_path / "mine.json"
    file.write_text(json.dumps(MINE))
    words = ["--local_rank=0", "train", tiny_recipe, "--run.dir", folder, "--engine.ds_config", file]
    done = call_on_ranks(2, cli.main, [str(word) for word in words])
    assert done.returncode == 0, done.stderr
    assert losses(folder) == pytest.approx(whole, rel=2e-4)
    said = [line for line in done.stderr.splitlines() if "mine.json is not used as it stands" in line]
    assert len(said) == 1
    assert "optimizer: `train.optimizer`" in said[0]
    given = json.loads((folder / "ds_config.json").read_text())
    zero = given["zero_optimization"]
    assert (zero["stage3_max_live_parameters"], zero["stage3_param_persistence_threshold"]) == (
        20000,
        10 * 32,
    )
    assert zero["offload_param"]["device"] == "cpu"
    assert "optimizer" not in given
    assert json.loads((folder / "result.json").read_text())["zero_stage"] == 3


def test_what_deepspeed_itself_refuses_is_an_error(tiny_recipe: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}, "communication_data_type": "fp17"}))
    done = on_ranks(1, "train", tiny_recipe, "--run.dir", tmp_path / "run", "--engine.ds_config", file)
    assert done.returncode == 2
    assert (
        "DeepSpeed refuses its configuration (engine.ds_config): Invalid communication_data_type"
        in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_int8_shards_learn_as_whole_weights_do_and_serve_as_well(
    tiny_recipe: Path, tmp_path: Path, whole: dict[int, float]
) -> None:
    folder = tmp_path / "run"
    done = on_ranks(2, "train", tiny_recipe, "--run.dir", folder, "--engine.ds_config", "zero3-quantized")
    assert done.returncode == 0, done.stderr
    assert losses(folder) == pytest.approx(whole, rel=0.1)
    assert losses(folder) != pytest.approx(whole, rel=1e-6)
    given = json.loads((folder / "ds_config.json").read_text())
    assert given["zero_optimization"]["zero_quantized_nontrainable_weights"] is True
    done = on_ranks(2, "evaluate", folder / "adapter")  # at the run's stage, with int8 shards
    assert done.returncode == 0, done.stderr
    best = json.loads((folder / "result.json").read_text())["metrics"]["best"]
    assert json.loads(done.stdout.splitlines()[-1])["metrics"]["accuracy"] == best["accuracy"]


def test_late_prompts_under_hpz(tiny_recipe: Path, tmp_path: Path) -> None:
    """Two encoders in one process, the lower and the upper half, have the same groups of ranks."""
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}))
    found = []
    for ranks, engine in ((1, ()), (4, ("--engine.ds_config", file))):
        folder = tmp_path / str(ranks)
        late = ("--run.dir", folder, "--adapter.first_layer", 2, "--engine.state_cache", "memory")
        done = on_ranks(ranks, "train", tiny_recipe, *late, *engine)
        assert done.returncode == 0, done.stderr
        found.append(losses(folder))
    assert found[1] == pytest.approx(found[0], rel=2e-4)
    given = json.loads((folder / "ds_config.json").read_text())["zero_optimization"]
    assert given["zero_hpz_partition_size"] == 2
