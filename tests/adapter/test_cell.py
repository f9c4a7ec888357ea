"""Cells: their formulas, sizes and starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpc_dist.adapter.cell import CELLS, Unit
from gpc_dist.adapter.lane import Adapter, EncoderShape

from .encoders import randomise
from .grafts import options
from .reference import cell_rule

H, L, P, R = 12, 4, 5, 3
SHAPE = EncoderShape(layers=L, hidden_size=H, embedding_size=H)


def adapter(cell: str, seed: int = 0, **more: Any) -> Adapter:
    return Adapter(options("residual", cell=cell, prompt_tokens=P, **more), SHAPE, outputs=2, seed=seed)


def states() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, P, H, generator=generator), torch.randn(2, P, H, generator=generator)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("rank", [None, R])
@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_computes_its_formula(cell: str, rank: int | None, per_layer: bool) -> None:
    made = adapter(cell, cell_rank=rank, cell_per_layer=per_layer)
    randomise(made)
    encoded, previous = states()
    for layer in range(L - 1):
        expected = cell_rule(made)(layer, encoded, previous)
        torch.testing.assert_close(made.next_prompt(layer, encoded, previous), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rank", "unit"), [(None, H * H), (R, 2 * H * R)])
@pytest.mark.parametrize(("per_layer", "count"), [(False, 1), (True, L - 1)])
@pytest.mark.parametrize(("cell", "bias"), [("recurrent", H), ("gated", H), ("residual", 0)])
def test_parameter_counts(
    cell: str, bias: int, per_layer: bool, count: int, rank: int | None, unit: int
) -> None:
    made = adapter(cell, cell_rank=rank, cell_per_layer=per_layer)
    assert sum(p.numel() for p in made.cell.parameters()) == count * (2 * unit + bias)


@pytest.mark.parametrize(
    ("method", "tokens"),
    [("prompt-tuning", P), ("deep-prompt", P + (L - 1) * P), ("linear-probe", 0)],
)
def test_methods_without_a_cell_have_prompts_and_a_head_only(method: str, tokens: int) -> None:
    made = Adapter(options("residual", method=method, prompt_tokens=P), SHAPE, outputs=2)
    assert sum(p.numel() for p in made.parameters()) == tokens * H + 2 * H + 2
    assert made.prompt_tokens == (P if tokens else 0)


@pytest.mark.parametrize("rank", [None, R])
def test_a_residual_cell_starts_as_the_identity(rank: int | None) -> None:
    encoded, previous = states()
    made = adapter("residual", cell_rank=rank)
    assert torch.equal(made.next_prompt(0, encoded, previous), encoded)


@pytest.mark.parametrize("rank", [None, R])
def test_a_gated_cell_starts_with_its_gate_nearly_closed(rank: int | None) -> None:
    encoded, previous = states()
    gate = torch.sigmoid(torch.tensor(-4.0))
    expected = (1 - gate) * encoded + gate * previous
    torch.testing.assert_close(
        adapter("gated", cell_rank=rank).next_prompt(0, encoded, previous), expected, rtol=1e-6, atol=1e-6
    )


def test_a_recurrent_cell_uses_both_units_from_the_start_and_stays_in_bounds() -> None:
    encoded, previous = states()
    made = adapter("recurrent")
    written = made.next_prompt(0, encoded, previous)
    assert not torch.allclose(made.next_prompt(0, encoded + 1, previous), written)
    assert not torch.allclose(made.next_prompt(0, encoded, previous + 1), written)
    assert made.next_prompt(0, 100 * encoded, previous).abs().max() <= 1


@pytest.mark.parametrize("zero", [False, True])
def test_a_low_rank_unit_is_a_product_of_that_rank(zero: bool) -> None:
    unit = Unit(H, R, zero=zero)
    matrix = unit(torch.eye(H)).detach()
    assert torch.linalg.matrix_rank(matrix) == (0 if zero else R)
    assert unit[0].weight.abs().max() > 0  # else no gradient would reach either factor


def test_a_bf16_state_is_computed_in_float32_and_given_back_in_bf16() -> None:
    made = adapter("recurrent")
    encoded, previous = (x.bfloat16() for x in states())
    written = made.next_prompt(0, encoded, previous)
    assert torch.equal(written, made.next_prompt(0, encoded.float(), previous.float()).bfloat16())


@pytest.mark.parametrize("method", ["gpc", "prompt-tuning", "deep-prompt", "linear-probe"])
def test_a_seed_fixes_every_start_and_leaves_the_callers_generator_alone(method: str) -> None:
    config = options("residual", method=method, cell="recurrent")
    state = torch.get_rng_state()
    first, again, other = (dict(Adapter(config, SHAPE, 2, s).named_parameters()) for s in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.linear.weight"], other["head.linear.weight"])


def test_one_seed_gives_every_method_the_same_head() -> None:
    heads = [
        Adapter(options("residual", method=m), SHAPE, 2, seed=3).head.linear.weight
        for m in ("gpc", "prompt-tuning", "deep-prompt", "linear-probe")
    ]
    assert all(torch.equal(head, heads[0]) for head in heads[1:])


def test_the_parts_of_an_adapter_are_the_first_names_of_its_parameters() -> None:
    from gpc_dist.adapter.lane import PARTS

    made: list[nn.Module] = [adapter("gated"), Adapter(options("deep-prompt"), SHAPE, 2)]
    assert {name.split(".")[0] for m in made for name, _ in m.named_parameters()} == set(PARTS)
