"""Cells: their formulas, sizes and starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpc_dist.adapter import AdapterConfig, attach
from gpc_dist.adapter.cell import CELLS, Start, Unit
from gpc_dist.adapter.lane import Adapter, EncoderShape
from gpc_dist.adapter.make import new_adapter
from gpc_dist.adapter.scale import text_rms
from gpc_dist.errors import UserError

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


TEXT = 3 * torch.randn(2, 6, H, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])


def written_by(made: Adapter, encoded: Tensor, previous: Tensor, layer: int = 0) -> Tensor:
    return made.next_prompt(layer, encoded, previous, TEXT, MASK)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("rank", [None, R])
@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_computes_its_formula(cell: str, rank: int | None, per_layer: bool) -> None:
    made = adapter(cell, cell_rank=rank, cell_per_layer=per_layer)
    randomise(made)
    encoded, previous = states()
    for layer in range(L - 1):
        expected = cell_rule(made, MASK)(layer, encoded, previous, TEXT)
        found = written_by(made, encoded, previous, layer)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


ABLATIONS: dict[str, dict[str, Any]] = {
    "remember": {"cell_units": "remember"},
    "forget": {"cell_units": "forget"},
    "norm": {"cell_norm": True},
    "prompt scale": {"cell_scale": "prompt"},
    "text scale": {"cell_scale": "text"},
    "all": {"cell_units": "remember", "cell_norm": True, "cell_scale": "prompt", "cell_rank": R},
}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_an_ablated_cell_computes_its_formula(cell: str, ablation: str) -> None:
    made = adapter(cell, **ABLATIONS[ablation])
    randomise(made)
    encoded, previous = states()
    expected = cell_rule(made, MASK)(0, encoded, previous, TEXT)
    torch.testing.assert_close(written_by(made, encoded, previous), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_gradients_of_an_ablated_cell_equal_finite_differences(cell: str, ablation: str) -> None:
    made = adapter(cell, **ABLATIONS[ablation]).double()
    randomise(made)
    encoded, previous = (x.double().requires_grad_() for x in states())
    parameters = tuple(made.cell.parameters())
    assert torch.autograd.gradcheck(
        lambda e, p, *_: written_by(made, e, p), (encoded, previous, *parameters), fast_mode=True
    )


@pytest.mark.parametrize(("scale", "expected"), [("prompt", states()[0]), ("text", None)])
def test_what_a_scaled_cell_writes_has_the_size_it_is_told(scale: str, expected: Tensor | None) -> None:
    made = adapter("recurrent", cell_scale=scale)
    written = written_by(made, *states())

    def size(x: Tensor) -> Tensor:
        return x.square().mean(-1).sqrt()

    if expected is None:  # the second row has two tokens of text
        sizes = torch.stack([size(TEXT)[0].mean(), size(TEXT)[1, :2].mean()])[:, None].expand(-1, P)
    else:
        sizes = size(expected)
    torch.testing.assert_close(size(written), sizes)


def test_the_scale_of_the_text_is_a_constant() -> None:
    made = adapter("recurrent", cell_scale="text")
    text = TEXT.clone().requires_grad_()
    made.next_prompt(0, *states(), text, MASK).sum().backward()
    assert text.grad is None


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("cell", CELLS)
def test_a_normed_cell_writes_the_same_at_another_size_of_the_states(cell: str, factor: float) -> None:
    made = adapter(cell, cell_norm=True)
    randomise(made)
    encoded, previous = states()
    found = written_by(made, factor * encoded, factor * previous) / factor
    torch.testing.assert_close(found, written_by(made, encoded, previous), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_cell_leaves_the_layers_alone_that_it_is_not_given(per_layer: bool) -> None:
    made = adapter("gated", cell_layers=[0, 2], cell_per_layer=per_layer)
    randomise(made)
    assert len(made.cell) == (2 if per_layer else 1)
    encoded, previous = states()
    for layer in range(L - 1):
        acts = layer != 1
        assert made.rewrites_after(layer) is acts
        assert bool(made.rewriting_parameters(layer)) is acts
        expected = cell_rule(made, MASK)(layer, encoded, previous, TEXT)
        assert torch.equal(expected, encoded) is not acts
        torch.testing.assert_close(written_by(made, encoded, previous, layer), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("pooling", "last"), [("mean", L - 2), ("prompt", L - 1), ("prompt-first", L - 1)])
def test_a_layer_whose_prompt_nothing_reads_is_refused_with_the_valid_range(pooling: str, last: int) -> None:
    adapter("gated", cell_layers=[last], pooling=pooling)
    for wrong in (last + 1, 40):
        with pytest.raises(
            UserError, match=rf"written after layer {wrong}: .* has {L} layers, give some of 0 to {last}"
        ):
            adapter("gated", cell_layers=[0, wrong], pooling=pooling)


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_cell_acts_after_the_last_layer_where_the_head_reads_the_prompt(per_layer: bool) -> None:
    made = adapter("residual", cell_per_layer=per_layer, pooling="prompt")
    randomise(made)
    assert len(made.cell) == (L if per_layer else 1)
    encoded, previous = states()
    expected = cell_rule(made, MASK)(L - 1, encoded, previous, TEXT)
    assert not torch.equal(expected, encoded)
    torch.testing.assert_close(written_by(made, encoded, previous, L - 1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("units", "absent"), [("remember", "forget"), ("forget", "remember")])
@pytest.mark.parametrize("cell", CELLS)
def test_a_unit_that_is_left_out_has_no_parameters(cell: str, units: str, absent: str) -> None:
    whole, part = (dict(adapter(cell, cell_units=u).named_parameters()) for u in ("both", units))
    assert whole.keys() - part.keys() == {f"cell.0.{absent}.0.weight"}
    assert part.keys() < whole.keys()


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


@pytest.mark.parametrize("more", [{}, {"cell_rank": R}, {"cell_units": "forget"}, {"cell_scale": "prompt"}])
def test_a_residual_cell_starts_as_the_identity(more: dict[str, Any]) -> None:
    encoded, previous = states()
    made = adapter("residual", **more)
    assert torch.equal(written_by(made, encoded, previous), encoded)


@pytest.mark.parametrize("rank", [None, R])
def test_a_gated_cell_starts_with_its_gate_nearly_closed(rank: int | None) -> None:
    encoded, previous = states()
    gate = torch.sigmoid(torch.tensor(-4.0))
    expected = (1 - gate) * encoded + gate * previous
    torch.testing.assert_close(
        written_by(adapter("gated", cell_rank=rank), encoded, previous), expected, rtol=1e-6, atol=1e-6
    )


def test_a_recurrent_cell_starts_from_the_sum_of_what_it_is_given() -> None:
    encoded, previous = states()
    torch.testing.assert_close(
        written_by(adapter("recurrent"), encoded, previous), torch.tanh(encoded + previous)
    )


@pytest.mark.parametrize("rank", [None, 64])
def test_a_long_prompt_starts_as_different_states_in_every_layer(
    minilm: Any, minilm_tokenizer: Any, rank: int | None
) -> None:
    """Drawn at random, the cell's units let the positions of 100 prompt tokens grow alike from layer to layer: the mean
    cosine of two of them rose from 0.1 to 0.3, training took it to 0.9, and some seeds then learnt nothing."""
    graft = attach(minilm, AdapterConfig(prompt_tokens=100, cell_rank=rank), tokenizer=minilm_tokenizer)
    lanes = [
        new_adapter(graft, graft.adapter.config, 2, tokenizer=minilm_tokenizer, seed=seed)
        for seed in range(10)
    ]
    alike: list[float] = []
    slopes: list[float] = []

    def look(cell: nn.Module, given: tuple[Tensor, ...], written: Tensor) -> None:
        mean = torch.nn.functional.normalize(written, dim=-1).mean(1)
        alike.append(mean.square().sum().item())
        slopes.append((1 - cell.rule(*cell.read(*given[:2])[:2]).square()).mean().item())

    for lane in lanes:
        lane.cell[0].register_forward_hook(look)
    texts = minilm_tokenizer(["a moving and funny film"] * len(lanes), return_tensors="pt")
    with torch.no_grad():
        graft(texts["input_ids"], lane_rows=[1] * len(lanes), lanes=lanes)
    assert len(alike) == len(lanes) * (graft.parts.shape.layers - 1)
    assert max(alike) < 0.15
    assert min(slopes) > 0.15  # tanh is not saturated, so gradients pass


def test_a_recurrent_cell_uses_both_units_from_the_start_and_stays_in_bounds() -> None:
    encoded, previous = states()
    made = adapter("recurrent")
    written = written_by(made, encoded, previous)
    assert not torch.allclose(written_by(made, encoded + 1, previous), written)
    assert not torch.allclose(written_by(made, encoded, previous + 1), written)
    assert written_by(made, 100 * encoded, previous).abs().max() <= 1


def test_a_recurrent_cell_starts_without_bias_and_deep_prompts_small() -> None:
    assert not adapter("recurrent").cell[0].bias.any()
    shape = EncoderShape(layers=4, hidden_size=64, embedding_size=64)
    deep = Adapter(options("deep-prompt", prompt_tokens=50), shape, 2).prompt.deep
    assert deep.shape == (3, 50, 64)
    assert deep.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(deep.mean().item()) < 0.001


@pytest.mark.parametrize("scale", ["none", "prompt", "text"])
@pytest.mark.parametrize("cell", CELLS)
def test_states_of_zeros_have_finite_gradients(cell: str, scale: str) -> None:
    made = adapter(cell, cell_norm=True, cell_scale=scale)
    encoded, previous = (torch.zeros(2, P, H, requires_grad=True) for _ in range(2))
    written = written_by(made, encoded, previous)
    assert written.isfinite().all()
    written.sum().backward()
    for tensor in (encoded, previous, *made.cell.parameters()):
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_scale_of_the_text_is_a_mean_over_its_tokens_in_float32_or_better(
    dtype: torch.dtype, kept: torch.dtype
) -> None:
    states = torch.tensor([[[3.0, 4.0], [6.0, 8.0], [99.0, 99.0]]] * 3, dtype=dtype)
    found = text_rms(states, torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]))
    assert found.dtype == kept
    # roots of 25/2 and 100/2; a row without text has none
    expected = torch.tensor([[[(12.5**0.5 + 50**0.5) / 2]], [[12.5**0.5]], [[0.0]]], dtype=kept)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("start", ["zero", "identity"])
def test_a_low_rank_unit_is_a_product_of_that_rank(start: Start) -> None:
    unit = Unit(H, R, start)
    matrix = unit(torch.eye(H)).detach()
    assert torch.linalg.matrix_rank(matrix) == (0 if start == "zero" else R)
    assert unit[0].weight.abs().max() > 0  # else no gradient would reach either factor


@pytest.mark.parametrize("rank", [R, H, 2 * H])
def test_a_low_rank_identity_is_a_projection_that_keeps_the_size_of_random_states(rank: int) -> None:
    matrix = Unit(H, rank, "identity")(torch.eye(H)).detach()
    enlarged = max(1, H / rank) ** 0.5
    torch.testing.assert_close(matrix @ matrix, enlarged * matrix)
    torch.testing.assert_close(matrix, matrix.T)
    # the mean over all directions of how much it stretches their squares
    torch.testing.assert_close(matrix.square().sum() / H, torch.tensor(1.0))


def test_a_bf16_state_is_computed_in_float32_and_given_back_in_bf16() -> None:
    made = adapter("recurrent")
    encoded, previous = (x.bfloat16() for x in states())
    written = written_by(made, encoded, previous)
    assert torch.equal(written, written_by(made, encoded.float(), previous.float()).bfloat16())


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
    assert {name.split(".")[0] for m in made for name, _ in m.named_parameters()} == set(PARTS) - {
        "encoder"
    }  # taken later, with one method
