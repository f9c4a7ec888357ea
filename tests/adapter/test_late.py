"""A prompt that enters before a later layer: outputs, gradients and what does not run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpc_dist.adapter import AdapterConfig, GraftedEncoder, attach
from gpc_dist.adapter.families import locate
from gpc_dist.adapter.halves import check_halves
from gpc_dist.adapter.make import new_adapter
from gpc_dist.errors import UserError

from .encoders import FAMILIES, VOCAB, H, L, P, batch_for, tiny
from .grafts import assert_lanes_as_alone, gradients, grafted, options, read_of, read_states
from .reference import cell_rule, run_layers_late
from .test_families import UNTESTED
from .test_gradients import in_float64, loss_in_float64

LATE = [
    ("recurrent", 1),
    ("text-scale", 1),
    ("per-layer", 1),
    ("deep-prompt", 1),
    ("prompt-tuning", 1),
    ("prompt-tuning", 2),
    ("read-by-the-head", 2),
]
"""Methods and layers before which their prompt enters, of the 3 of a tiny encoder."""


def late(family: str | Any, method: str, first_layer: int, **more: Any) -> GraftedEncoder:
    if method == "text-scale":  # which elsewhere acts after layer 0 alone
        more["cell_layers"] = None
    return grafted(family, options(method, first_layer=first_layer, **more))


@pytest.mark.parametrize(("method", "first"), LATE)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_late_prompt_equals_the_layers_run_one_by_one(family: str, method: str, first: int) -> None:
    batch = batch_for(family)
    graft = late(family, method, first)
    rule = cell_rule(graft.adapter, batch["attention_mask"])
    expected = run_layers_late(tiny(family), batch, graft.adapter.prompt.start, first, rule)
    assert expected.shape == (3, P + 11, H)
    torch.testing.assert_close(
        read_states(graft, batch), read_of(expected, graft.adapter.config), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_late_prompt_is_the_encoders_own_bf16_bit_for_bit(family: str, first: int) -> None:
    batch = batch_for(family)
    graft = late(tiny(family).bfloat16(), "prompt-tuning", first)
    start = graft.adapter.prompt.start.bfloat16()
    expected = run_layers_late(tiny(family).bfloat16(), batch, start, first, lambda _, encoded, *__: encoded)
    assert torch.equal(read_states(graft, batch), read_of(expected, graft.adapter.config))


@pytest.mark.parametrize(("method", "first"), LATE)
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_gradients_of_a_late_prompt_equal_those_of_a_float64_recomputation(
    family: str, method: str, first: int
) -> None:
    encoder, batch = tiny(family), batch_for(family)
    graft = late(encoder, method, first)
    weights = {name: w.requires_grad_() for name, w in in_float64(graft.adapter).items()}
    loss_in_float64(family, tiny(family), graft.adapter, batch)(weights).backward()
    for name, gradient in gradients(graft, batch).items():
        expected = weights[name].grad
        assert expected is not None
        scale = float(expected.abs().max())
        assert scale > 0, f"{name} takes no part in the loss"
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=2e-6 * scale, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_computed_before_give_the_same_bits(family: str) -> None:
    batch = batch_for(family)
    graft = late(family, "recurrent", 1)
    expected = gradients(graft, batch)
    states = graft.lower(*_of(batch))
    assert states.shape == (3, 11, H)
    assert not states.requires_grad
    found = gradients(graft, batch | {"text_states": states})
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def _of(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    return batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids")


@pytest.mark.parametrize("family", FAMILIES)
def test_with_states_no_layer_below_runs_and_no_token_is_read(family: str) -> None:
    batch = batch_for(family)
    graft = late(family, "gated", 1)
    states = graft.lower(*_of(batch))
    expected = graft(**batch)

    def never(*_: Any) -> None:
        raise AssertionError("it ran")

    graft.parts.layers[0].register_forward_pre_hook(never)
    graft.token_embeddings.register_forward_pre_hook(never)
    assert torch.equal(graft(**batch, text_states=states), expected)
    with pytest.raises(AssertionError, match="it ran"):
        graft(**batch)


@pytest.mark.parametrize("family", ["bert", "modernbert", "t5"])
def test_recomputed_layers_give_the_same_gradients(family: str) -> None:
    batch = batch_for(family)
    expected = gradients(late(family, "gated", 1), batch)
    graft = late(family, "gated", 1)
    graft.checkpoint_activations()
    runs = [0] * L
    for index, layer in enumerate(graft.parts.layers):

        def count(*_: Any, index: int = index) -> None:
            runs[index] += 1

        inside = {"bert": "attention", "modernbert": "attn", "t5": "layer.0"}[family]
        layer.get_submodule(inside).register_forward_pre_hook(count)
    found = gradients(graft, batch)
    assert runs == [1, 2, 2]
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("family", ["albert", "bert", "deberta-v2", "modernbert", "t5", "umt5"])
def test_late_lanes_give_what_they_give_alone(family: str) -> None:
    batch, methods = batch_for(family, lengths=(9, 4, 7, 9, 2, 6)), ["gated", "prompt-tuning", "deep-prompt"]
    graft = late(family, "prompt-tuning", 1)
    lanes = [new_adapter(graft, options(method, first_layer=1), 3) for method in methods]
    assert_lanes_as_alone(graft, batch, lanes, [2, 3, 1])


def test_a_pass_takes_adapters_of_its_own_layer_only() -> None:
    graft = late("bert", "prompt-tuning", 1)
    other = late("bert", "prompt-tuning", 2).adapter
    with pytest.raises(ValueError, match="the prompts of all lanes must enter before layer 1"):
        graft(**batch_for("bert"), lanes=[other])


@torch.no_grad()
def test_a_linear_probe_reads_the_encoder_as_it_is() -> None:
    encoder, batch = tiny("t5"), batch_for("t5")
    graft = attach(encoder, AdapterConfig(method="linear-probe"), outputs=3)
    assert graft.first_layer == L
    assert torch.equal(read_states(graft, batch), tiny("t5")(**batch).last_hidden_state)


@pytest.mark.parametrize("init", ["vocab", "text", "labels", "uniform"])
def test_a_late_prompt_starts_from_states_that_enter_its_layer(init: str) -> None:
    encoder = tiny("bert")
    config = options("prompt-tuning", first_layer=2, prompt_init=init, prompt_text="bdf", prompt_tokens=6)
    graft = attach(encoder, config, tokenizer=_Letters(), label_words=["ca", "e"], seed=3)
    start = graft.adapter.prompt.start.detach()
    if init == "uniform":
        assert start.shape == (6, H)
        assert 0.1 < float(start.std()) < 10
        return
    words = {"text": [11, 13, 15, 11, 13, 15], "labels": [12, 10, 14]}.get(init, [])
    drawn = torch.arange(5, VOCAB)[
        torch.randperm(VOCAB - 5, generator=torch.Generator().manual_seed(3))
    ].tolist()
    ids = torch.tensor([(words + drawn)[:6]])
    states = tiny("bert")(ids, output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(start, states.detach())


class _Letters:
    """A tokenizer of letters, `a` to `f` as 10 to 15, with the first five tokens as special ones."""

    all_special_ids = (0, 1, 2, 3, 4)

    def __len__(self) -> int:
        return VOCAB

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [10 + "abcdef".index(letter) for letter in text]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"t{i}" for i in ids]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"first_layer": 3}, "there is no layer 3: the encoder has 3 layers, give one of 0 to 2"),
        ({"first_layer": 2}, "adapter.first_layer 2 leaves no layer after which .* give at most 1"),
        ({"first_layer": 1, "cell_layers": [0]}, "written after layer 0: .* give some of 1 to 1"),
    ],
)
def test_a_layer_at_which_nothing_can_enter_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        attach(tiny("bert"), options("gated", **settings))


@pytest.mark.parametrize(
    ("share", "layers", "first"), [(0.5, 6, 3), (0.75, 24, 18), (0.1, 10, 1), (0.9, 3, 2)]
)
def test_a_share_of_the_layers_is_rounded_down(share: float, layers: int, first: int) -> None:
    assert AdapterConfig(first_layer=share).entry_layer(layers) == first


@pytest.mark.parametrize("family", UNTESTED)
def test_an_untested_family_that_runs_in_halves_takes_a_late_prompt(family: str) -> None:
    graft = late(tiny(family, **UNTESTED[family]), "gated", 1)
    assert gradients(graft, batch_for("t5")).keys() == dict(graft.adapter.named_parameters()).keys()


@pytest.mark.parametrize("broken", ["differs", "fails"])
def test_an_encoder_whose_upper_layers_need_the_lower_ones_is_refused(broken: str) -> None:
    encoder = tiny("bert")
    memory: dict[str, Tensor] = {}

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        memory["first"] = output

    def add(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        carried = memory.pop("first") if broken == "fails" else memory.pop("first", torch.tensor(0.0))
        return args[0] + carried, *args[1:]

    parts = locate(encoder)
    parts.layers[0].register_forward_hook(keep)
    parts.layers[2].register_forward_pre_hook(add)
    with pytest.raises(UserError, match="encoder family 'bert' cannot take a prompt before a later layer"):
        check_halves(parts, 1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_grafts_of_several_first_layers_share_one_encoder(family: str) -> None:
    """As those of a server do; a T5's layer k gets the bias that layer 0 computes, and keeps it."""
    batch, shared = batch_for(family), tiny(family)
    firsts = (2, 0, 1)
    together = [late(shared, "prompt-tuning", first) for first in firsts]
    apart = [late(family, "prompt-tuning", first) for first in firsts]
    for one, other in zip(together, apart, strict=True):
        other.load_state_dict(one.state_dict())
        torch.testing.assert_close(one(**batch), other(**batch), rtol=1e-5, atol=1e-5)
