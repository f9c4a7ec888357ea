"""A head that mixes the pooled states of several layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpc_dist.adapter import AdapterConfig, GraftedEncoder, attach
from gpc_dist.adapter.halves import PooledStates
from gpc_dist.adapter.make import new_adapter
from gpc_dist.config import build
from gpc_dist.errors import UserError

from .encoders import FAMILIES, L, batch_for, randomise, tiny
from .grafts import assert_lanes_as_alone, gradients, grafted, options

PLACES = [("recurrent", 0), ("recurrent", 1), ("deep-prompt", 1), ("prompt-tuning", 2)]


def mixing(family: str, method: str, first: int, **more: Any) -> GraftedEncoder:
    return grafted(family, options(method, first_layer=first, head_layers="mix", **more))


def by_formula(head: nn.Module, states: list[Tensor], mask: Tensor, pooling: str) -> Tensor:
    """Outputs of the head from the text states of each layer, `[R, T, H]`, in float64 and by loops."""
    w = {name: p.detach().double() for name, p in head.named_parameters()}
    rows = []
    for row in range(len(mask)):
        length = int(mask[row].sum())
        pooled = [
            (s[row, 0] if pooling == "first" else s[row, :length].mean(0)).detach().double() for s in states
        ]
        size = pooled[-1].square().mean().sqrt()
        weights = torch.exp(w["mix"]) / torch.exp(w["mix"]).sum()
        mixed = sum(
            share * each / each.square().mean().sqrt() * size
            for share, each in zip(weights, pooled, strict=True)
        )
        rows.append(w["linear.weight"] @ mixed + w["linear.bias"])
    return torch.stack(rows)


@pytest.mark.parametrize(("pooling", "first"), [("mean", 0), ("first", 0), ("mean", 2)])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"albert", "electra"}))
def test_a_probe_mixes_the_encoders_own_hidden_states(family: str, pooling: str, first: int) -> None:
    """Those that transformers gives; of two families it gives embeddings in another width as the first."""
    batch = batch_for(family)
    config = AdapterConfig(method="linear-probe", head_layers="mix", pooling=pooling, first_layer=first)
    graft = attach(tiny(family), config, outputs=3)
    randomise(graft.adapter, seed=1)
    assert graft.first_layer == L
    # from embeddings, because RoBERTa numbers the padding of ids in another way
    plain = tiny(family)
    inputs = {"inputs_embeds": plain.get_input_embeddings()(batch.pop("input_ids")), **batch}
    states = list(plain(**inputs, output_hidden_states=True).hidden_states)
    assert len(states) == L + 1
    expected = by_formula(graft.adapter.head, states[first:], batch["attention_mask"], pooling)
    batch = batch_for(family)
    torch.testing.assert_close(graft(**batch).double(), expected, rtol=1e-4, atol=1e-5)
    read = PooledStates(graft.parts, pooling, first)
    given = read(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))
    assert given.shape == (len(expected), read.count, graft.parts.shape.hidden_size)
    torch.testing.assert_close(graft(**batch, text_states=given).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "first"), PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_states_that_enter_each_layer_are_mixed(family: str, method: str, first: int) -> None:
    graft, batch = mixing(family, method, first), batch_for(family)
    tokens = graft.prompt_tokens
    if graft.lower:
        batch["text_states"] = graft.lower(
            batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids")
        )
    seen: list[Tensor] = []
    for layer in graft.parts.layers[first:]:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, tokens:].detach()))
    encoder = graft.upper.parts.encoder if graft.upper else graft.encoder
    encoder.register_forward_hook(lambda *a: seen.append(a[-1].last_hidden_state[:, tokens:].detach()))
    outputs = graft(**batch)
    assert len(seen) == L - first + 1
    expected = by_formula(graft.adapter.head, seen, batch["attention_mask"], "mean")
    torch.testing.assert_close(outputs.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "first"), PLACES)
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_its_gradients_are_the_slopes_of_the_loss(family: str, method: str, first: int) -> None:
    graft, batch = mixing(family, method, first), batch_for(family)
    found = gradients(graft, batch)
    assert found.keys() == dict(graft.adapter.named_parameters()).keys()

    def loss() -> float:
        outputs = graft(**batch)
        return float((outputs * torch.linspace(-1, 1, outputs.numel()).view_as(outputs)).sum())

    generator = torch.Generator().manual_seed(3)
    for name, parameter in graft.adapter.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator)
        direction /= direction.norm()
        slopes = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter += sign * 1e-2 * direction
                slopes.append(loss())
                parameter -= sign * 1e-2 * direction
        expected = float((found[name] * direction).sum())
        assert (slopes[0] - slopes[1]) / 2e-2 == pytest.approx(
            expected, rel=2e-2, abs=2e-3 * float(found[name].norm())
        ), name


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_all_weight_on_the_last_layer_is_the_plain_head(family: str) -> None:
    graft, batch = mixing(family, "recurrent", 1), batch_for(family)
    plain = grafted(family, options("recurrent", first_layer=1))
    with torch.no_grad():
        graft.adapter.head.mix.copy_(torch.tensor([-1e4] * (L - 1) + [0.0]))
        for name, parameter in plain.adapter.named_parameters():
            parameter.copy_(dict(graft.adapter.named_parameters())[name])
    torch.testing.assert_close(graft(**batch), plain(**batch), rtol=1e-6, atol=1e-6)


def test_lanes_that_mix_and_lanes_that_do_not_give_what_they_give_alone() -> None:
    batch = batch_for("bert", lengths=(9, 4, 7, 9))
    graft = grafted("bert", options("gated"))
    lanes = [new_adapter(graft, options("gated", head_layers=layers), 3) for layers in ("mix", "last", "mix")]
    assert_lanes_as_alone(graft, batch, lanes, [1, 2, 1])


def test_probes_of_other_layers_and_poolings_share_a_pass() -> None:
    batch = batch_for("bert", lengths=(9, 4, 7, 9))
    configs = [
        AdapterConfig(method="linear-probe", head_layers="mix"),
        AdapterConfig(method="linear-probe", pooling="first"),
        AdapterConfig(method="linear-probe", head_layers="mix", first_layer=2, pooling="first"),
    ]
    graft = attach(tiny("bert"), configs[1], outputs=3)
    lanes = [new_adapter(graft, config, 3) for config in configs]
    assert_lanes_as_alone(graft, batch, lanes, [1, 2, 1])


def test_recomputed_layers_give_the_same_gradients() -> None:
    batch = batch_for("t5")
    expected = gradients(mixing("t5", "gated", 0), batch)
    graft = mixing("t5", "gated", 0)
    graft.checkpoint_activations()
    found = gradients(graft, batch)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_mix_starts_as_the_mean_of_its_layers() -> None:
    head = attach(
        tiny("bert"), AdapterConfig(method="linear-probe", head_layers="mix", first_layer=2)
    ).adapter.head
    assert head.mix.tolist() == [0.0, 0.0]


def test_a_mix_reads_layers_that_are_there() -> None:
    config = AdapterConfig(method="linear-probe", head_layers="mix", first_layer=L)
    assert attach(tiny("bert"), config).adapter.head.mix.shape == (1,)
    with pytest.raises(UserError, match=f"there is no layer {L + 1}: .* give one of 0 to {L}"):
        attach(tiny("bert"), config.model_copy(update={"first_layer": L + 1}))


@pytest.mark.parametrize("first", [0, 2, 0.5])
def test_a_mix_of_the_prompt_is_refused(first: float) -> None:
    tree = {"adapter": {"pooling": "prompt", "head_layers": "mix", "first_layer": first}}
    with pytest.raises(UserError, match=r"head_layers 'mix' reads the text"):
        build(tree)
