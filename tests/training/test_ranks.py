"""The same run on one and on two ranks, at every ZeRO stage, stopped and resumed in every direction.

Every run is a real one: processes with gloo, DeepSpeed where something is sharded.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpc_dist import cli
from gpc_dist.adapter.fingerprint import fingerprint_files
from gpc_dist.errors import EXIT_ENVIRONMENT
from tests.conftest import losses
from tests.holds import Hold
from tests.processes import (
    _launch,
    call_on_ranks,
    on_ranks,
    start_call,
    start_launcher,
    start_on_ranks,
    wait_until,
)

pytestmark = pytest.mark.slow

ARRANGEMENTS = [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3), (1, 3)]
"""Ranks and ZeRO stage."""


def train(recipe: Path, folder: Path, ranks: int, stage: int, *more: object) -> Path:
    done = on_ranks(ranks, "train", recipe, "--run.dir", folder, "--engine.zero_stage", stage, *more)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> dict[tuple[int, int], Path]:
    root = tmp_path_factory.mktemp("runs")
    return {
        (ranks, stage): train(tiny_recipe, root / f"{ranks}-{stage}", ranks, stage)
        for ranks, stage in ARRANGEMENTS
    }


def trained(folder: Path) -> dict[str, object]:
    return load_file(folder / "adapter" / "adapter.safetensors")


def test_a_cell_scaled_to_the_text_learns_the_same_when_sharded(tiny_recipe: Path, tmp_path: Path) -> None:
    """With what the graft reads beyond a lane's own prompt: the text's scale, and the prompt in the last layer."""
    more = ("--adapter.cell_scale", "text", "--adapter.cell_layers", "[0, 2]", "--adapter.pooling", "prompt")
    alone = train(tiny_recipe, tmp_path / "alone", 1, 0, *more, "--adapter.cell", "gated")
    sharded = train(tiny_recipe, tmp_path / "sharded", 2, 3, *more, "--adapter.cell", "gated")
    assert losses(sharded) == pytest.approx(losses(alone), rel=2e-4)


def last_state(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS[1:])
def test_losses_do_not_depend_on_ranks_or_stage(
    runs: dict[tuple[int, int], Path], arrangement: tuple[int, int]
) -> None:
    reference, found = losses(runs[1, 0]), losses(runs[arrangement])
    assert len(reference) == 12
    assert found == pytest.approx(reference, rel=2e-4)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_result_says_what_was_run(runs: dict[tuple[int, int], Path], arrangement: tuple[int, int]) -> None:
    result = json.loads((runs[arrangement] / "result.json").read_text())
    assert (result["world_size"], result["zero_stage"]) == arrangement
    assert result["steps"] == 12
    assert len(result["peak_memory_mib"]) == arrangement[0]
    assert result["trainable_parameters"] == sum(t.numel() for t in trained(runs[arrangement]).values())
    assert 0 <= result["padding_pct"] < 100
    assert result["metrics"]["best"].keys() >= {"accuracy"}


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_0_to_2_on_equal_ranks_make_the_same_adapter(
    runs: dict[tuple[int, int], Path], stage: int
) -> None:
    zero, other = (load_file(last_state(runs[2, s]) / "trained.safetensors") for s in (0, stage))
    assert zero.keys() == other.keys()
    assert all(zero[name].equal(other[name]) for name in zero)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(
    runs: dict[tuple[int, int], Path], tiny_recipe: Path, tmp_path: Path, stage: int
) -> None:
    folder = train(
        tiny_recipe, tmp_path / "run", 2, stage, "--train.save_every", "5", "--train.keep_last", "9"
    )
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    shutil.rmtree(folder / "checkpoints" / "step-00000010")
    train(tiny_recipe, folder, 2, stage)
    assert losses(folder) == losses(runs[2, stage])
    for name in ("trained.safetensors", "rng.safetensors"):
        mine, other = (load_file(last_state(f) / name) for f in (folder, runs[2, stage]))
        assert mine.keys() == other.keys()
        assert all(mine[key].equal(other[key]) for key in mine)


@pytest.mark.parametrize(
    ("before", "after"), [((2, 0), (1, 0)), ((1, 0), (2, 1)), ((2, 1), (2, 3)), ((2, 2), (1, 3))]
)
def test_resume_on_other_ranks_and_stages(
    runs: dict[tuple[int, int], Path],
    tiny_recipe: Path,
    tmp_path: Path,
    before: tuple[int, int],
    after: tuple[int, int],
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[before], folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    assert last_state(folder).name == "step-00000008"
    train(tiny_recipe, folder, *after)
    assert losses(folder) == pytest.approx(losses(runs[1, 0]), rel=2e-4)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def train_and_keep_shards(recipe: Path, run: Path, folder: Path) -> None:
    """On a rank: train, then write this rank's part of every sharded weight, and the token table."""
    from gpc_dist.training import train as training

    bases = []

    def load_and_note(*arguments: Any) -> Any:
        bases.append(load_base(*arguments))
        return bases[-1]

    load_base, training.load_base = training.load_base, load_and_note
    assert cli.main(["train", str(recipe), "--run.dir", str(run), "--engine.zero_stage", "3"]) == 0
    (base,) = bases
    shards = {name: p.ds_tensor.clone() for name, p in base.parts.encoder.named_parameters()}
    table = base.parts.token_embeddings.weight.detach().clone()
    save_file(shards | {TABLE: table}, folder / f"{os.environ['RANK']}.safetensors")


TABLE = "embeddings.word_embeddings.weight"


def test_sharded_weights_are_the_checkpoints_after_training(
    tiny_recipe: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    before = (tiny_encoder / "model.safetensors").read_bytes()
    done = call_on_ranks(2, train_and_keep_shards, tiny_recipe, tmp_path / "run", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tiny_encoder / "model.safetensors").read_bytes() == before
    original = load_file(tiny_encoder / "model.safetensors")
    parts = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    assert parts[0].keys() == {name for name in original if not name.startswith("pooler.")}
    assert all(torch.equal(part.pop(TABLE), original[TABLE]) for part in parts)
    for name, first in parts[0].items():
        assert len(first) == -(-original[name].numel() // 2), name  # half of it, not all
        whole = torch.cat([first, parts[1][name]])[: original[name].numel()]
        assert torch.equal(whole, original[name].flatten()), name


def test_an_adapter_names_its_encoder_by_the_files_hash(
    runs: dict[tuple[int, int], Path], tiny_encoder: Path
) -> None:
    card = json.loads((runs[2, 3] / "adapter" / "adapter_config.json").read_text())
    assert card["encoder"]["sha256"] == fingerprint_files([tiny_encoder / "model.safetensors"])


def test_an_adapter_folder_holds_trained_tensors_and_nothing_else(
    runs: dict[tuple[int, int], Path],
) -> None:
    folder = runs[2, 3] / "adapter"
    assert sorted(p.name for p in folder.iterdir()) == ["adapter.safetensors", "adapter_config.json"]
    count = sum(t.numel() for t in trained(runs[2, 3]).values())
    header = (folder / "adapter.safetensors").stat().st_size - 4 * count
    assert 0 < header < 1024


# -- stopped and killed: ranks that the program has started itself ---------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_stops_with_state_saved_and_the_run_goes_on(
    tiny_recipe: Path, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    hold = Hold(folder, 3)
    launcher = start_launcher("train", tiny_recipe, "--run.dir", folder, "--engine.ranks", 2)
    hold.wait(lambda: launcher.stderr)
    launcher.send_signal(number)
    assert launcher.wait() == 75, launcher.stderr
    assert f"stopped by {number.name}" in launcher.stderr
    assert sorted(losses(folder)) == [1, 2, 3, 4]
    assert last_state(folder).name == "step-00000004"
    assert json.loads((folder / "status.json").read_text())["state"] == "stopped"
    train(tiny_recipe, folder, 1, 0)
    assert sorted(losses(folder)) == list(range(1, 13))


def evaluations(run: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["val/accuracy"]) for line in lines if "val/accuracy" in line]


def test_a_stop_does_not_wait_for_an_evaluation(
    runs: dict[tuple[int, int], Path], tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setenv("GPC_DIST_IDLE", str(tmp_path / "note"))
    hold = Hold(folder, 4)  # after which it evaluates
    ranks = start_on_ranks(2, cli.main, ["train", str(tiny_recipe), "--run.dir", str(folder)])
    hold.wait()
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    assert ranks[0].wait() == 75, ranks[0].stderr
    assert ranks[1].wait() == 0, ranks[1].stderr  # the main rank alone speaks of a stop
    assert "stopped by SIGTERM" in ranks[0].stderr
    assert not (tmp_path / "note").exists()  # it has got somewhere
    assert sorted(losses(folder)) == [1, 2, 3, 4]
    assert evaluations(folder) == []
    train(tiny_recipe, folder, 2, 0)
    assert losses(folder) == losses(runs[2, 0])
    assert evaluations(folder) == evaluations(runs[2, 0])
    assert len(evaluations(folder)) == 3
    adapters = [(run / "adapter" / "adapter.safetensors").read_bytes() for run in (folder, runs[2, 0])]
    assert adapters[0] == adapters[1]


def test_a_killed_rank_ends_the_job(tiny_recipe: Path, tmp_path: Path) -> None:
    hold = Hold(tmp_path / "run", 3)
    launcher = start_launcher("train", tiny_recipe, "--run.dir", tmp_path / "run", "--engine.ranks", 2)
    hold.wait(lambda: launcher.stderr)
    ranks = sorted(psutil.Process(launcher.pid).children(), key=lambda each: each.create_time())
    launcher.send_signal(signal.SIGSTOP)  # it finds the killed rank and the one that lost it at once
    ranks[1].kill()
    hold.release()
    wait_until(lambda: ranks[0].status() == psutil.STATUS_ZOMBIE)
    launcher.send_signal(signal.SIGCONT)
    assert launcher.wait() == 128 + signal.SIGKILL
    assert "rank 1 ended with signal SIGKILL" in launcher.stderr
    assert not ranks[0].is_running()


def train_but_lose(words: list[str], number: str, call: str) -> int:
    """On a rank: it is killed where it would call a function of `training.train`, if it is this one."""
    from gpc_dist.training import train

    if os.environ["RANK"] == number:
        setattr(train, call, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    return cli.main(words)


@pytest.mark.parametrize(("lost", "call"), [(1, "saved_state"), (0, "open_folder")])
def test_a_rank_lost_while_the_run_is_prepared_is_one_line_and_no_obstacle(
    tiny_recipe: Path, tmp_path: Path, lost: int, call: str
) -> None:
    words = ["train", str(tiny_recipe), "--run.dir", str(tmp_path / "run")]
    ranks = start_on_ranks(2, train_but_lose, words, str(lost), call)
    assert ranks[lost].wait() == -signal.SIGKILL
    assert ranks[1 - lost].wait() == EXIT_ENVIRONMENT
    said = ranks[1 - lost].stderr
    assert "gpc-dist: error: another rank is gone" in said
    assert "Traceback" not in said
    train(tiny_recipe, tmp_path / "run", 2, 0)


def launch_without_memory(words: list[str], rank: str) -> int:
    """As a launcher: one of its ranks finds no memory while the other waits for it."""
    from gpc_dist.training import train

    open_session = train.open_session

    def open_large(*arguments: Any) -> Any:
        if os.environ["RANK"] == rank:
            torch.empty(2**60, dtype=torch.uint8)
        return open_session(*arguments)

    train.open_session = open_large
    return _launch(words)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_rank_that_failed_is_heard_before_the_one_that_lost_it(
    tiny_recipe: Path, tmp_path: Path, rank: str
) -> None:
    words = ["train", str(tiny_recipe), "--run.dir", str(tmp_path), "--engine.ranks", "2"]
    launcher = start_call(launch_without_memory, words, rank)
    assert launcher.wait() == EXIT_ENVIRONMENT
    assert "gpc-dist: error: out of memory" in launcher.stderr
    assert ("rank 1 ended with exit code 3" in launcher.stderr) == (rank == "1")


# -- what else changes nothing ---------------------------------------------------------------------------


def test_more_ranks_than_examples_in_a_step(tiny_recipe: Path, tmp_path: Path) -> None:
    one = train(tiny_recipe, tmp_path / "one", 1, 0, "--train.batch_size", "1", "--train.steps", "4")
    two = train(tiny_recipe, tmp_path / "two", 2, 3, "--train.batch_size", "1", "--train.steps", "4")
    assert losses(two) == pytest.approx(losses(one), rel=2e-4)


def test_accumulation_changes_nothing(
    runs: dict[tuple[int, int], Path], tiny_recipe: Path, tmp_path: Path
) -> None:
    folder = train(tiny_recipe, tmp_path / "run", 2, 3, "--engine.micro_batch_tokens", "40")
    assert losses(folder) == pytest.approx(losses(runs[1, 0]), rel=2e-4)


def test_activation_checkpointing_changes_nothing_under_zero_3(
    runs: dict[tuple[int, int], Path], tiny_recipe: Path, tmp_path: Path
) -> None:
    folder = train(tiny_recipe, tmp_path / "run", 2, 3, "--engine.activation_checkpointing", "true")
    assert losses(folder) == pytest.approx(losses(runs[2, 3]), rel=1e-5)


def test_bf16_follows_fp32(runs: dict[tuple[int, int], Path], tiny_recipe: Path, tmp_path: Path) -> None:
    folder = train(tiny_recipe, tmp_path / "run", 2, 3, "--engine.dtype", "bf16")
    assert losses(folder) == pytest.approx(losses(runs[1, 0]), rel=0.05)
    assert all(t.dtype.is_floating_point and t.element_size() == 4 for t in trained(folder).values())


def test_cpu_offload_of_the_frozen_weights(
    runs: dict[tuple[int, int], Path], tiny_recipe: Path, tmp_path: Path
) -> None:
    folder = train(tiny_recipe, tmp_path / "run", 2, 3, "--engine.offload_param", "cpu")
    assert losses(folder) == pytest.approx(losses(runs[1, 0]), rel=2e-4)
