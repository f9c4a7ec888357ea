"""Adapters that start from others: what is taken, what is left, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gpc_dist.adapter import Adapter, AdapterConfig, attach
from gpc_dist.adapter.families import locate
from gpc_dist.adapter.fingerprint import identify
from gpc_dist.adapter.lane import Origin
from gpc_dist.adapter.store import WEIGHTS, load_adapter, read_card, save_adapter
from gpc_dist.adapter.transfer import read_source, start_from
from gpc_dist.errors import UserError
from gpc_dist.files import sha256

from .encoders import H, P, tiny
from .grafts import METHODS, grafted, options

ENCODER = identify(tiny("bert"))


def saved(folder: Path, config: AdapterConfig, family: str = "bert", task: str = "films") -> Path:
    """An adapter with random values for a task of three labels."""
    graft = grafted(family, config)
    save_adapter(folder, graft.adapter, identify(graft.encoder), {"task": {"name": task}, "data": {}})
    return folder


def started(folder: Path, config: AdapterConfig, same_labels: bool = True) -> tuple[Adapter, Adapter, str]:
    """A new adapter as it starts from a saved one, the same without that, and what is said of it."""
    new, plain = (attach(tiny("bert"), config, outputs=3).adapter for _ in range(2))
    said = start_from(new, read_source(str(folder)), ENCODER, same_labels)
    return new, plain, said


def values(adapter: Adapter, part: str) -> dict[str, torch.Tensor]:
    return {name: p for name, p in adapter.named_parameters() if name.startswith(f"{part}.")}


def prompts(adapter: Adapter) -> list[torch.Tensor]:
    """The prompts that enter the layers, as an MLP makes them if there is one."""
    assert adapter.prompt is not None
    deep = adapter.prompt.deep
    return [adapter.prompt.first] if deep is None else [adapter.prompt.first, adapter.prompt.made(deep)]


def assert_same(one: Adapter, other: Adapter, *parts: str) -> None:
    for part in parts:
        mine, theirs = values(one, part), values(other, part)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("method", METHODS)
def test_all_of_an_adapter_of_the_same_kind_is_taken(tmp_path: Path, method: str) -> None:
    source, _ = load_adapter(saved(tmp_path / "source", options(method)))
    new, _, said = started(tmp_path / "source", options(method))
    parts = ["prompt", "head"] if new.cell is None else ["prompt", "cell", "head"]
    assert_same(new, source, *parts[1:])
    for mine, theirs in zip(prompts(new), prompts(source), strict=True):
        assert torch.equal(mine, theirs)
    assert said == ", ".join(parts)
    weights = sha256(tmp_path / "source" / WEIGHTS)
    assert new.origin == Origin("films", weights, parts)


def test_the_head_of_other_labels_stays_as_it_starts(tmp_path: Path) -> None:
    source, _ = load_adapter(saved(tmp_path / "source", options("gated")))
    new, plain, said = started(tmp_path / "source", options("gated"), same_labels=False)
    assert_same(new, source, "prompt", "cell")
    assert_same(new, plain, "head")
    assert said == "prompt, cell, not the head (other labels)"


@pytest.mark.parametrize(
    "other", [{"pooling": "first"}, {"head_hidden": True}, {"head_layers": "mix"}], ids=str
)
def test_the_head_that_reads_other_states_stays_as_it_starts(tmp_path: Path, other: dict[str, Any]) -> None:
    saved(tmp_path / "source", options("gated"))
    new, plain, said = started(tmp_path / "source", options("gated", **other))
    assert_same(new, plain, "head")
    assert "not the head (" in said


@pytest.mark.parametrize("method", ["gated", "deep-prompt"])
def test_a_longer_prompt_begins_with_the_tokens_of_the_source(tmp_path: Path, method: str) -> None:
    source, _ = load_adapter(saved(tmp_path / "source", options(method)))
    new, plain, said = started(tmp_path / "source", options(method, prompt_tokens=P + 3))
    for name, mine in values(new, "prompt").items():
        theirs, fresh = dict(source.named_parameters())[name], dict(plain.named_parameters())[name]
        assert torch.equal(mine[..., :P, :], theirs)
        assert torch.equal(mine[..., P:, :], fresh[..., P:, :])
    assert "prompt (4 of 7 tokens)" in said


@pytest.mark.parametrize("method", ["gated", "deep-prompt"])
def test_a_shorter_prompt_takes_the_first_tokens_of_the_source(tmp_path: Path, method: str) -> None:
    source, _ = load_adapter(saved(tmp_path / "source", options(method)))
    new, _, said = started(tmp_path / "source", options(method, prompt_tokens=3))
    for name, mine in values(new, "prompt").items():
        assert torch.equal(mine, dict(source.named_parameters())[name][..., :3, :])
    assert "prompt (its first 3 of 4 tokens)" in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cell", "residual"),
        ("cell_rank", 3),
        ("cell_units", "forget"),
        ("cell_norm", True),
        ("cell_scale", "prompt"),
        ("cell_per_layer", True),
    ],
)
def test_of_another_cell_the_prompt_alone_is_taken(tmp_path: Path, key: str, value: Any) -> None:
    source, _ = load_adapter(saved(tmp_path / "source", options("gated")))
    new, plain, said = started(tmp_path / "source", options("gated", **{key: value}))
    assert_same(new, source, "prompt", "head")
    assert_same(new, plain, "cell")
    assert f"not the cell (another adapter.{key})" in said


def test_cells_of_their_own_for_other_layers_are_not_taken(tmp_path: Path) -> None:
    saved(tmp_path / "source", options("per-layer", cell_layers=[0]))
    new, plain, said = started(tmp_path / "source", options("per-layer", cell_layers=[1]))
    assert_same(new, plain, "cell")
    assert "not the cell (it has cells for other layers)" in said


def test_cells_of_their_own_for_the_same_layers_are_taken_however_these_are_given(tmp_path: Path) -> None:
    source, _ = load_adapter(saved(tmp_path / "source", options("per-layer", cell_layers=[0, 1])))
    new, _, _ = started(tmp_path / "source", options("per-layer"))
    assert_same(new, source, "cell")


def test_a_head_of_other_outputs_than_its_labels_are_is_not_taken(tmp_path: Path) -> None:
    saved(tmp_path / "source", options("gated"))
    new = attach(tiny("bert"), options("gated"), outputs=2).adapter
    said = start_from(new, read_source(str(tmp_path / "source")), ENCODER, same_labels=True)
    assert "not the head (it has 3 outputs)" in said


def test_one_cell_serves_other_layers_and_prompts_that_enter_elsewhere(tmp_path: Path) -> None:
    source, _ = load_adapter(saved(tmp_path / "source", options("gated")))
    new, plain, said = started(tmp_path / "source", options("gated", first_layer=1))
    assert_same(new, source, "cell")
    assert_same(new, plain, "prompt")
    assert "not the prompt (it enters before layer 0, and here before 1)" in said
    assert new.origin is not None
    assert new.origin.parts == ["cell", "head"]


def test_a_prompt_starts_one_of_another_method(tmp_path: Path) -> None:
    source, _ = load_adapter(saved(tmp_path / "source", options("gated")))
    for method in ("prompt-tuning", "deep-prompt"):
        new, plain, _ = started(tmp_path / "source", options(method), same_labels=False)
        assert new.prompt is not None
        assert source.prompt is not None
        assert torch.equal(new.prompt.start, source.prompt.start)
        if new.prompt.deep is not None:
            assert torch.equal(new.prompt.deep, plain.prompt.deep)  # type: ignore[union-attr, arg-type]


def test_a_prompt_that_an_mlp_made_starts_one_without_it_and_the_other_way(tmp_path: Path) -> None:
    made, plain = tmp_path / "made", tmp_path / "plain"
    sources = [
        load_adapter(saved(made, options("prompt-tuning-mlp")))[0],
        load_adapter(saved(plain, options("gated")))[0],
    ]
    for folder, source, method in zip((made, plain), sources, ("gated", "prompt-tuning-mlp"), strict=True):
        new, _, _ = started(folder, options(method), same_labels=False)
        assert torch.equal(prompts(new)[0], prompts(source)[0])


def test_an_adapter_of_which_nothing_fits_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "probe", AdapterConfig(method="linear-probe"))
    with pytest.raises(UserError) as refused:
        started(tmp_path / "probe", options("gated"), same_labels=False)
    assert str(tmp_path / "probe") in str(refused.value)
    assert "not the prompt (there is none), not the cell (there is none), not the head (other labels)" in str(
        refused.value
    )


def test_the_head_of_a_linear_probe_starts_a_prompts(tmp_path: Path) -> None:
    source, _ = load_adapter(saved(tmp_path / "probe", AdapterConfig(method="linear-probe")))
    new, _, _ = started(tmp_path / "probe", options("prompt-tuning"))
    assert_same(new, source, "head")


def test_an_adapter_of_another_encoder_is_refused_with_both_names(tmp_path: Path) -> None:
    saved(tmp_path / "source", options("gated"), family="roberta")
    with pytest.raises(UserError) as refused:
        started(tmp_path / "source", options("gated"))
    for name in (str(tmp_path / "source"), "'roberta'", "'bert'", ENCODER.sha256[:12]):
        assert name in str(refused.value)


def test_a_fine_tuned_encoder_is_no_start(tmp_path: Path) -> None:
    parts = locate(tiny("bert"))
    adapter = Adapter(AdapterConfig(method="fine-tuning"), parts.shape, 3)
    adapter.take_encoder(parts.encoder, parts.token_embeddings)
    save_adapter(tmp_path / "source", adapter, ENCODER)
    with pytest.raises(UserError, match=r"was trained together with its encoder"):
        read_source(str(tmp_path / "source"))
    with pytest.raises(ValueError, match=r"adapter.init_from needs a frozen encoder"):
        AdapterConfig(method="fine-tuning", init_from="source")


def test_an_adapter_in_a_notebook_starts_from_another_one(tmp_path: Path) -> None:
    source, _ = load_adapter(saved(tmp_path / "source", options("gated")))
    config = options("gated", init_from=str(tmp_path / "source"))
    graft = attach(tiny("bert"), config, outputs=5)
    assert_same(graft.adapter, source, "prompt", "cell")
    graft.save_pretrained(tmp_path / "own")
    card = read_card(tmp_path / "own")
    assert card.origin == Origin("films", sha256(tmp_path / "source" / WEIGHTS), ["prompt", "cell"])
    assert card.adapter.init_from is None  # a path of this machine
    again, _ = load_adapter(tmp_path / "own")
    assert again.origin == card.origin
    assert f"films, sha256 {card.origin.weights_sha256}" in (tmp_path / "own" / "README.md").read_text()


def test_a_prompt_of_embeddings_of_another_width_enters_before_layer_0_alone(tmp_path: Path) -> None:
    """ELECTRA embeds in a smaller width than its states have."""
    graft = grafted("electra", options("gated"))
    encoder = identify(graft.encoder)
    save_adapter(tmp_path / "source", graft.adapter, encoder)
    late = attach(tiny("electra"), options("gated", first_layer=1), outputs=3).adapter
    assert late.prompt is not None
    assert late.prompt.start.shape == (P, H)
    start = late.prompt.start.detach().clone()
    start_from(late, read_source(str(tmp_path / "source")), encoder, same_labels=False)
    assert torch.equal(late.prompt.start, start)
