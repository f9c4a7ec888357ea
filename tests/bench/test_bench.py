"""`gpc-dist bench`: the training step, measured; the figures agree with each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpc_dist.errors import EXIT_USAGE
from tests.conftest import gpc
from tests.processes import on_ranks


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 3)])
def test_the_figures_agree(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, stage: int
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--steps", 4, "--json", "found.json", "--engine.zero_stage", stage)
    done = on_ranks(ranks, "bench", tiny_recipe, *words)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["found.json"]
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["world_size"], found["steps"], found["examples_per_step"]) == (ranks, 4, 9)
    assert len(found["peak_memory_mib"]) == ranks
    assert 0 <= found["padding_pct"] < 100
    assert (found["communication_pct"] > 0) == (ranks > 1)
    mean_s = found["examples_per_step"] / found["examples_per_s"]
    tflops = found["model_tflop_per_step"] / mean_s
    assert found["mfu_pct"]["measured"] == pytest.approx(100 * tflops / found["peak_tflops"]["measured"])
    assert found["mfu_pct"]["datasheet"] is None
    assert found["hfu_pct"] == found["mfu_pct"]


@pytest.mark.slow
def test_recomputation_counts_for_the_hardware_only(tiny_recipe: Path, tmp_path: Path) -> None:
    words = ("--steps", 2, "--json", tmp_path / "found.json", "--lengths", "fixed")
    assert gpc("bench", tiny_recipe, *words, "--engine.activation_checkpointing", "true") == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["padding_pct"] == 0
    assert 1.4 < found["hfu_pct"]["measured"] / found["mfu_pct"]["measured"] < 1.51


@pytest.mark.slow
def test_a_known_shape_needs_no_encoder(tmp_path: Path) -> None:
    """Of the recipe only the settings are used: its encoder is not looked for."""
    code = gpc(
        *("bench", "t5-xl", "--shape", "t5-v1_1-small", "--steps", 2, "--json", tmp_path / "found.json"),
        *("--engine.zero_stage", 0, "--engine.device", "cpu", "--engine.dtype", "fp32"),
        *("--data.max_length", 8, "--train.batch_size", 2, "--adapter.prompt_tokens", 4),
        "--engine.activation_checkpointing=false",
    )
    assert code == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["encoder"] == "t5-v1_1-small, random weights"
    # 32,128 tokens; 8 layers of 4 x 512 x 384 and 3 x 512 x 1024; norms and 32 buckets x 6 heads
    weights = 32_128 * 512 + 8 * (4 * 512 * 384 + 3 * 512 * 1024) + 17 * 512 + 32 * 6
    assert found["frozen_parameters"] == weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "t6"], "--shape 't6' is unknown: give one of t5-v1_1-small"),
        (["--lengths", "long"], "--lengths 'long' is unknown: give one of fixed, mix"),
    ],
)
def test_what_is_unknown_is_named(
    tiny_recipe: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpc("bench", tiny_recipe, *arguments) == EXIT_USAGE
    assert message in capsys.readouterr().err
