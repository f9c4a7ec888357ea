"""Life with a graft: as a notebook uses it, on the real MiniLM and on tiny encoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModel

from gpc_dist.adapter import AdapterConfig, attach

from .encoders import FAMILIES, batch_for, tiny
from .grafts import METHODS, gradients, grafted, options, read_states, trained

TEXTS = ["A lovely evening.", "Awful, I left early.", "What a joy it was!", "The worst meal in years."]


def test_a_few_steps_of_plain_pytorch_learn(minilm_folder: Any, minilm_tokenizer: Any) -> None:
    torch.manual_seed(0)
    labels = torch.tensor([1, 0, 1, 0])
    model = attach(AutoModel.from_pretrained(minilm_folder), AdapterConfig(prompt_tokens=20))
    batch = minilm_tokenizer(TEXTS, return_tensors="pt", padding=True)
    optimizer = torch.optim.AdamW(model.adapter.parameters(), lr=2e-3)
    losses = []
    model.train()
    for _ in range(10):
        loss = cross_entropy(model(**batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert model(**batch).argmax(-1).tolist() == labels.tolist()


def test_defaults_are_those_of_the_configuration() -> None:
    graft = attach(tiny("bert"))
    assert graft.adapter.config == AdapterConfig()
    assert graft.adapter.outputs == 2


@pytest.mark.parametrize("method", METHODS)
def test_outputs_are_float32_rows(method: str) -> None:
    outputs = grafted("bert", options(method), outputs=5)(**batch_for("bert"))
    assert (tuple(outputs.shape), outputs.dtype) == ((3, 5), torch.float32)


def test_training_mode_keeps_the_encoder_in_eval_mode() -> None:
    config = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    encoder = tiny("bert", **config).train()  # as a model made from a configuration is
    graft, batch = grafted(encoder, options("gated")), batch_for("bert")
    expected = graft(**batch)
    for mode in (True, False):
        assert graft.train(mode) is graft
        assert graft.adapter.training is mode
        assert not any(module.training for module in graft.encoder.modules())
        assert torch.equal(graft(**batch), expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_encoder_itself_stays_what_it_was(family: str) -> None:
    encoder, batch = tiny(family), batch_for(family)
    plain = encoder(**batch).last_hidden_state
    weights = {name: p.clone() for name, p in encoder.named_parameters()}
    graft = grafted(encoder, options("recurrent"))
    grafted_outputs = graft(**batch)
    assert torch.equal(encoder(**batch).last_hidden_state, plain)  # between passes
    graft.detach_hooks()
    assert not any(layer._forward_hooks for layer in graft.parts.layers)
    assert torch.equal(encoder(**batch).last_hidden_state, plain)
    assert not torch.allclose(graft(**batch), grafted_outputs, atol=1e-3)  # the cell has gone with the hooks
    after = dict(encoder.named_parameters())
    assert after.keys() == weights.keys()
    assert all(torch.equal(p, weights[name]) for name, p in after.items())


@pytest.mark.parametrize("family", ["albert", "t5"])
def test_two_grafts_on_one_encoder_do_not_touch_each_other(family: str) -> None:
    """As when a notebook's cell that attaches is run again."""
    encoder, batch = tiny(family), batch_for(family)
    first = grafted(encoder, options("recurrent"))
    alone = first(**batch)
    second = grafted(encoder, options("deep-prompt"))
    expected = grafted(family, options("deep-prompt"))(**batch)
    assert torch.equal(second(**batch), expected)
    assert torch.equal(first(**batch), alone)


def test_a_failed_pass_leaves_the_encoder_plain() -> None:
    encoder, batch = tiny("bert"), batch_for("bert")
    plain = encoder(**batch).last_hidden_state
    graft = grafted(encoder, options("recurrent"))
    with pytest.raises(RuntimeError):
        graft(**batch | {"attention_mask": batch["attention_mask"][:, :5]})
    assert torch.equal(encoder(**batch).last_hidden_state, plain)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("method", ["gated", "deep-prompt", "prompt-tuning"])
@pytest.mark.parametrize("family", ["albert", "bert", "modernbert"])
def test_float32_adapter_on_a_bf16_encoder_comes_close_to_float32(family: str, method: str) -> None:
    batch = batch_for(family)
    full = grafted(family, options(method))
    half = grafted(tiny(family).bfloat16(), options(method))
    assert read_states(half, batch).dtype == torch.bfloat16
    outputs, expected = half(**batch), full(**batch)
    assert outputs.dtype == torch.float32
    assert distance(outputs, expected) < 0.02
    exact = gradients(full, batch)
    for name, gradient in gradients(half, batch).items():
        assert gradient.dtype == torch.float32
        assert distance(gradient, exact[name]) < 0.1, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_the_encoders_matrix_products_in_another_type(dtype: torch.dtype) -> None:
    graft, batch = grafted("bert", options("gated")), batch_for("bert")
    expected, seen = graft(**batch), []
    query = graft.parts.layers[0].attention.self.query
    query.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    graft.autocast = dtype
    outputs = graft(**batch)
    assert seen == [dtype]
    assert outputs.dtype == torch.float32
    assert 0 < distance(outputs, expected) < 0.02


def test_a_new_adapter_goes_to_its_encoders_device() -> None:
    # the linear probe: the one method whose start reads no embedding, which a meta tensor does not have
    graft = attach(tiny("bert").to("meta"), AdapterConfig(method="linear-probe"))
    assert {p.device.type for p in trained(graft).values()} == {"meta"}


def test_lanes_of_a_new_graft_are_modules_that_move_with_it() -> None:
    graft = grafted("bert", options("residual"))
    graft.to(torch.float64)
    assert {n: p.dtype for n, p in trained(graft).items()} == dict.fromkeys(trained(graft), torch.float64)
    assert {p.dtype for p in graft.encoder.parameters()} == {torch.float64}
