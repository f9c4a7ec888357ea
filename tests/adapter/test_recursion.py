"""The graft equals the recursion `p_{l+1} = Cell(e_l, p_l)` computed layer by layer without hooks."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from gpc_dist.adapter import AdapterConfig
from gpc_dist.errors import UserError

from .encoders import FAMILIES, L, P, batch_for, tiny
from .grafts import METHODS, grafted, options, read_of, read_states
from .reference import bert, cell_rule, keep, run_layers, start_of, t5, with_prompt

CELLS = [name for name in METHODS if not name.startswith("prompt-tuning")]


NARROW = ("albert", "electra")
"""Families whose embeddings are narrower than their states."""


@pytest.mark.parametrize(
    ("family", "method"),
    [each for each in product(FAMILIES, METHODS) if each not in product(NARROW, ["deep-prompt-mlp"])],
)
@torch.no_grad()
def test_graft_equals_the_layers_run_one_by_one(family: str, method: str) -> None:
    encoder, batch = tiny(family), batch_for(family)
    graft = grafted(family, options(method))
    inputs = with_prompt(encoder, start_of(graft.adapter), batch)
    expected = run_layers(encoder, inputs, P, cell_rule(graft.adapter, batch["attention_mask"]))
    torch.testing.assert_close(
        read_states(graft, batch), read_of(expected, graft.adapter.config), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", NARROW)
def test_one_mlp_does_not_serve_embeddings_and_states_of_two_widths(family: str) -> None:
    with pytest.raises(UserError, match=r"one MLP cannot serve both: give an adapter\.first_layer above 0"):
        grafted(family, options("deep-prompt-mlp"))
    grafted(family, options("deep-prompt-mlp", first_layer=1))


@pytest.mark.parametrize("method", ["gated", "text-scale", "deep-prompt", "prompt-tuning"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bf16_graft_equals_the_layers_run_one_by_one_in_bf16(family: str, method: str) -> None:
    """The cell computes in the adapter's float32; everything else is the encoder's own bf16, bit for bit."""
    encoder, batch = tiny(family).bfloat16(), batch_for(family)
    graft = grafted(tiny(family).bfloat16(), options(method))
    inputs = with_prompt(encoder, graft.adapter.prompt.start.bfloat16(), batch)

    def in_float32(layer: int, encoded: Tensor, previous: Tensor, text: Tensor) -> Tensor:
        mask = batch["attention_mask"]
        return graft.adapter.next_prompt(layer, encoded.float(), previous.float(), text, mask).bfloat16()

    expected = run_layers(encoder, inputs, P, in_float32)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(read_states(graft, batch), read_of(expected, graft.adapter.config))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_layers_run_one_by_one_are_the_plain_encoder(family: str) -> None:
    """The reference itself: without a cell it is the encoder's own forward pass."""
    encoder, batch = tiny(family), batch_for(family)
    inputs = with_prompt(encoder, torch.randn(P, encoder.get_input_embeddings().embedding_dim), batch)
    expected = encoder(**inputs).last_hidden_state
    torch.testing.assert_close(run_layers(encoder, inputs, P, keep), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_bert_graft_equals_plain_pytorch(method: str) -> None:
    graft, batch = grafted("bert", options(method)), batch_for("bert")
    expected = bert(
        graft.encoder.state_dict(),
        start_of(graft.adapter),
        batch["input_ids"],
        batch["attention_mask"],
        batch["token_type_ids"],
        cell_rule(graft.adapter, batch["attention_mask"]),
    )
    torch.testing.assert_close(
        read_states(graft, batch), read_of(expected, graft.adapter.config), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_t5_graft_equals_plain_pytorch(method: str) -> None:
    encoder = tiny("t5")
    graft, batch = grafted(encoder, options(method)), batch_for("t5")
    expected = t5(
        encoder.state_dict(),
        start_of(graft.adapter),
        batch["input_ids"],
        batch["attention_mask"],
        cell_rule(graft.adapter, batch["attention_mask"]),
    )
    torch.testing.assert_close(
        read_states(graft, batch), read_of(expected, graft.adapter.config), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_cell_starts_as_prompt_tuning_exactly(family: str) -> None:
    batch = batch_for(family)
    first = {
        name: grafted(family, options(name), draw=False)(**batch)
        for name in ("residual", "low-rank", "prompt-tuning")
    }
    # head included: the same seed gives the same head to every method
    assert torch.equal(first["residual"], first["prompt-tuning"])
    assert torch.equal(first["low-rank"], first["prompt-tuning"])


@pytest.mark.parametrize("pooling", ["mean", "prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_residual_cell_starts_as_prompt_tuning_with_every_other_default(family: str, pooling: str) -> None:
    batch = batch_for(family)
    default = AdapterConfig(prompt_tokens=P, pooling=pooling, cell="residual")
    plain = default.model_copy(update={"method": "prompt-tuning"})
    first, other = (grafted(family, config, draw=False)(**batch) for config in (default, plain))
    torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-5)


class Recorder(nn.Module):
    """Stands for a cell: notes what it was called with and moves the prompt by `shift`."""

    def __init__(self, shift: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.shift = shift
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, encoded: Tensor, previous: Tensor, _: Tensor | None) -> Tensor:
        self.seen.append((encoded, previous))
        return encoded + self.shift


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cell_acts_after_every_layer_but_the_last(family: str) -> None:
    graft, batch = grafted(family, options("residual")), batch_for(family)
    cell = Recorder(shift=0.5)
    graft.adapter.cell = nn.ModuleList([cell])
    graft(**batch)
    assert len(cell.seen) == L - 1
    if family != "deberta-v2":  # its convolution stands between the first layer and the second
        # what the second layer was given is what the cell made of the first layer's prompt
        assert torch.equal(cell.seen[1][1], cell.seen[0][0] + 0.5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", range(L - 1))
@torch.no_grad()
def test_the_prompt_written_after_each_layer_changes_the_text(family: str, layer: int) -> None:
    graft, batch = grafted(family, options("residual", cell_per_layer=True)), batch_for(family)
    graft.adapter.cell = nn.ModuleList([Recorder() for _ in range(L - 1)])
    before = read_states(graft, batch)
    graft.adapter.cell[layer].shift = torch.linspace(-1, 1, before.shape[-1])
    assert not torch.allclose(read_states(graft, batch), before, atol=1e-3)


@pytest.mark.parametrize("family", ["albert", "bert"])
@torch.no_grad()
def test_each_layer_has_its_own_cell_and_its_own_deep_prompt(family: str) -> None:
    batch = batch_for(family)
    graft = grafted(family, options("per-layer"))
    cells = [Recorder() for _ in range(L - 1)]
    graft.adapter.cell = nn.ModuleList(cells)
    graft(**batch)
    assert [len(cell.seen) for cell in cells] == [1] * (L - 1)

    deep = grafted(family, options("deep-prompt"))
    outputs = [deep(**batch)]
    for layer in range(L - 1):
        deep.adapter.prompt.deep[layer] += torch.linspace(-1, 1, deep.adapter.shape.hidden_size)
        outputs.append(deep(**batch))
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(outputs, outputs[1:], strict=False))


@pytest.mark.parametrize(("layers", "groups"), [(3, 1), (4, 2), (3, 3)])
@torch.no_grad()
def test_albert_layer_groups_are_unrolled_in_the_order_they_run(layers: int, groups: int) -> None:
    sizes = {"num_hidden_layers": layers, "num_hidden_groups": groups}
    encoder, batch = tiny("albert", **sizes), batch_for("albert")
    graft = grafted(tiny("albert", **sizes), options("deep-prompt"))
    inputs = with_prompt(encoder, graft.adapter.prompt.start, batch)
    expected = run_layers(encoder, inputs, P, cell_rule(graft.adapter, batch["attention_mask"]))
    torch.testing.assert_close(
        read_states(graft, batch), read_of(expected, graft.adapter.config), rtol=1e-5, atol=1e-5
    )
    assert len(graft.parts.layers) == layers
    count = sum(p.numel() for p in encoder.parameters())
    assert sum(p.numel() for p in graft.encoder.parameters()) == count  # weights are shared, not copied


@torch.no_grad()
def test_an_encoder_of_one_layer_has_no_place_for_a_cell() -> None:
    batch = batch_for("bert")
    outputs = [
        grafted(tiny("bert", num_hidden_layers=1), AdapterConfig(prompt_tokens=P, method=method), draw=False)(
            **batch
        )
        for method in ("gpc", "deep-prompt", "prompt-tuning")
    ]
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[2])
