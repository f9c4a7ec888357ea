"""What `gpc-dist similarity` says of adapters, against the same found another way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

from gpc_dist.adapter import GraftedEncoder
from gpc_dist.errors import EXIT_USAGE
from gpc_dist.reports.similarity import names_of
from tests import tiny
from tests.conftest import gpc
from tests.processes import on_ranks

KINDS: dict[str, tuple[object, ...]] = {
    "gpc": ("--adapter.cell", "gated"),
    "tokens": (
        *("--adapter.method", "prompt-tuning", "--adapter.prompt_tokens", 6),
        *("--adapter.prompt_mlp", 5, "--run.seed", 3),
    ),
    "read": ("--adapter.pooling", "prompt", "--train.cell_lr", 0.03),
    "late": ("--adapter.first_layer", 2, "--adapter.head_layers", "mix"),
}


@pytest.fixture(scope="module")
def adapters(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("runs")
    for kind, words in KINDS.items():
        assert gpc("train", tiny_recipe, "--run.dir", place / kind, "--train.lr", 0.05, *words) == 0
    return {kind: place / kind / "adapter" for kind in KINDS}


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of some lengths, under a name of their own."""
    file = tmp_path_factory.mktemp("probe") / "some.jsonl"
    rows = [{"said": " ".join(tiny.WORDS[at : at + 1 + at % 7])} for at in range(0, 40, 3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def found(adapters: dict[str, Path], probe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("found")
    words = ("--probe", probe, "--task.text", "[said]", "--output", place)
    assert gpc("similarity", *adapters.values(), *words) == 0
    assert (place / "similarity.png").stat().st_size > 5000
    figures: dict[str, Any] = json.loads((place / "similarity.json").read_text())
    return figures


def prompt_of(adapter: Path) -> torch.Tensor:
    return GraftedEncoder.from_pretrained(adapter).adapter.prompt.first.detach()  # type: ignore[union-attr]


def test_prompts_are_compared_by_their_mean_tokens_and_by_all_pairs(
    adapters: dict[str, Path], found: dict[str, Any]
) -> None:
    one, other = prompt_of(adapters["gpc"]), prompt_of(adapters["tokens"])
    place = found["names"].index("gpc"), found["names"].index("tokens")
    expected = cosine_similarity(one.mean(0), other.mean(0), dim=0).item()
    assert found["mean_tokens"][place[0]][place[1]] == pytest.approx(expected, abs=1e-5)
    pairs = [cosine_similarity(a, b, dim=0).item() for a in one for b in other]
    assert found["tokens"][place[0]][place[1]] == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)


def test_prompts_that_enter_before_different_layers_are_not_compared(found: dict[str, Any]) -> None:
    late = found["names"].index("late")
    for measure in ("mean_tokens", "tokens"):
        row = found[measure][late]
        assert [value is None for value in row] == [place != late for place in range(len(row))]
        assert found[measure][0][1] is not None


def changes(adapter: Path, texts: list[str], encoder: Path) -> torch.Tensor:
    """What an adapter changes of the mean state of each text, one text at a time, seen after the last layer."""
    tokenizer, plain = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder)
    graft = GraftedEncoder.from_pretrained(adapter)
    seen: list[torch.Tensor] = []
    graft.parts.layers[-1].register_forward_hook(  # type: ignore[union-attr]
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    rows = []
    with torch.no_grad():
        for text in texts:
            batch = tokenizer(text, return_tensors="pt")
            graft(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
            state = seen.pop()[0, graft.prompt_tokens :].mean(0)
            rows.append(state - plain(**batch).last_hidden_state[0].mean(0))
    return torch.stack(rows)


def test_effects_are_changes_of_the_texts_mean_state(
    adapters: dict[str, Path], probe: Path, found: dict[str, Any], tiny_encoder: Path
) -> None:
    texts = [json.loads(line)["said"] for line in probe.read_text().splitlines()]
    made = {kind: changes(adapter, texts, tiny_encoder) for kind, adapter in adapters.items()}
    assert found["texts"] == len(texts)
    for place, one in enumerate(KINDS):
        for other_place, other in enumerate(KINDS):
            expected = cosine_similarity(made[one], made[other], dim=1).mean().item()
            assert found["effects"][place][other_place] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_two_sharded_ranks_find_the_same(
    adapters: dict[str, Path], probe: Path, found: dict[str, Any], tmp_path: Path
) -> None:
    words = ("--probe", probe, "--task.text", "[said]", "--output", tmp_path, "--engine.zero_stage", 3)
    done = on_ranks(2, "similarity", *adapters.values(), *words)
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "similarity.json").read_text())
    for measure in ("mean_tokens", "tokens", "effects"):
        for mine, theirs in zip(again[measure], found[measure], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)


def test_the_demos_texts_are_the_probe_and_pairs_are_listed_by_their_effects(
    adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpc("similarity", adapters["gpc"], adapters["read"], adapters["late"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert sorted({tuple(sorted(line[:2])) for line in lines}) == [
        ("gpc", "late"),
        ("gpc", "read"),
        ("late", "read"),
    ]
    effects = [float(line[-1]) for line in lines]
    assert effects == sorted(effects, reverse=True)
    assert {line[2] for line in lines if "late" in line[:2]} == {"-"}


def test_what_cannot_be_compared_is_refused(
    adapters: dict[str, Path], tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpc("similarity", adapters["gpc"]) == EXIT_USAGE
    assert "give at least two adapters" in capsys.readouterr().err
    words = ("--adapter.method", "linear-probe", "--train.steps", 1, "--run.dir", tmp_path)
    assert gpc("train", tiny_recipe, *words) == 0
    assert gpc("similarity", adapters["gpc"], tmp_path / "adapter") == EXIT_USAGE
    assert "has no prompt to compare: its adapter.method is linear-probe" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(adapters["gpc"], other)
    card = json.loads((other / "adapter_config.json").read_text())
    card["encoder"] |= {"path": "another", "sha256": "0" * 64}
    (other / "adapter_config.json").write_text(json.dumps(card))
    assert gpc("similarity", adapters["gpc"], other) == EXIT_USAGE
    assert f"{other} was trained on encoder 'another' (sha256 000000000000)" in capsys.readouterr().err
    assert gpc("similarity", *adapters.values(), "--probe", tmp_path / "none.jsonl") == EXIT_USAGE
    assert "none.jsonl does not exist" in capsys.readouterr().err
    file = other / "adapter_config.json"
    assert gpc("similarity", *adapters.values(), "--output", file) == EXIT_USAGE
    assert f"--output {file} is a file: give a folder" in capsys.readouterr().err


def test_names_are_the_ends_of_paths_that_tell_them_apart() -> None:
    names = names_of([Path("/a/sst2/gpc/adapter"), Path("/a/cb/gpc/adapter"), Path("/a/b")])
    assert names == ["sst2/gpc", "cb/gpc", "a/b"]
    assert names_of([Path("/a/one/adapter"), Path("/a/two/adapter")]) == ["one", "two"]
    assert names_of([Path("/a/one/adapter"), Path("/a/one/adapter")]) == ["one", "one"]
