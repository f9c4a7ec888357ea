"""T5's fused attention against the attention of transformers, in float64, and what it must not copy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from transformers import MT5Config, MT5EncoderModel, T5Config, T5EncoderModel

from gpc_dist.encoder.attention import choose_kernels, kernels, share_position_bias
from gpc_dist.private.torch import FakeTensorMode

SHAPE: dict[str, Any] = {
    "vocab_size": 30,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 3,
    "num_heads": 4,
    "initializer_factor": 3.0,
}
MAKERS = {"t5": lambda: T5EncoderModel(T5Config(**SHAPE)), "mt5": lambda: MT5EncoderModel(MT5Config(**SHAPE))}


def models(family: str) -> tuple[Any, Any]:
    """A frozen encoder as transformers runs it operator by operator, and as we run it."""
    torch.manual_seed(0)
    theirs = MAKERS[family]().double().eval().requires_grad_(False)
    ours = copy.deepcopy(theirs)
    theirs.set_attn_implementation("eager")
    share_position_bias(ours)
    return theirs, ours


def states_and_gradient(model: Any, inputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    inputs = inputs.clone().requires_grad_()
    states = model(inputs_embeds=inputs, attention_mask=mask).last_hidden_state
    weights = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)
    (states * weights * mask[..., None]).sum().backward()
    return states.detach() * mask[..., None], inputs.grad  # type: ignore[return-value]


@pytest.mark.parametrize("lengths", [(37, 37), (37, 20), (16, 1)])
@pytest.mark.parametrize("family", MAKERS)
def test_states_and_gradients_are_those_of_plain_attention(family: str, lengths: tuple[int, int]) -> None:
    theirs, ours = models(family)
    length = max(lengths)
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    inputs = torch.randn(2, length, 32, dtype=torch.float64)
    expected, found = (states_and_gradient(model, inputs, mask) for model in (theirs, ours))
    for a, b in zip(expected, found, strict=True):
        assert float(a.abs().max()) > 1e-3
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


def test_one_bias_serves_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = models("t5")
    seen: list[Tensor] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def record(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs["attn_mask"])
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    mask = torch.ones(2, 37, dtype=torch.long)
    mask[1, 5:] = 0
    ours(inputs_embeds=torch.randn(2, 37, 32, dtype=torch.float64), attention_mask=mask)
    assert len(seen) == 3
    assert len({bias.data_ptr() for bias in seen}) == 1
    # rows start where the CUDA kernel wants them, or it would make a copy in every layer
    assert all(stride % 16 == 0 for stride in seen[0].stride()[:-1])


class Attending(torch.nn.Module):
    """A layer of attention alone, which notes whether the fused kernel may be used."""

    fused = True

    def forward(self, states: Tensor) -> Tensor:
        self.fused = torch.backends.cuda.flash_sdp_enabled()
        heads = states.unflatten(-1, (4, -1)).transpose(1, 2)
        return (
            torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        )


@pytest.mark.parametrize(
    ("dtype", "tokens", "autocast", "fused"),
    [
        (torch.bfloat16, 22, False, False),
        (torch.bfloat16, 256, False, False),
        (torch.bfloat16, 257, False, True),
        (torch.float32, 22, False, True),
        (torch.float32, 22, True, False),
    ],
)
def test_short_rows_in_bf16_are_attended_to_without_the_fused_kernel(
    dtype: torch.dtype, tokens: int, autocast: bool, fused: bool
) -> None:
    layers = torch.nn.ModuleList([Attending()])
    choose_kernels(layers)
    states = torch.randn(2, tokens, 32, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = layers[0](states)
    found.float().square().sum().backward()
    assert layers[0].fused == fused
    exact = states.detach().double().requires_grad_()
    expected = Attending()(exact)
    expected.square().sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=0.03, atol=0.03)
    torch.testing.assert_close(states.grad.double(), exact.grad, rtol=0.05, atol=0.1)  # type: ignore[union-attr]
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize(("tokens", "cudnn"), [(22, False), (319, False), (320, True), (512, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cudnn_plans_no_short_lengths(dtype: torch.dtype, tokens: int, cudnn: bool) -> None:
    with FakeTensorMode():
        chosen = kernels(torch.empty(2, tokens, 32, dtype=dtype, device="cuda"))
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    assert chosen == (None if cudnn else others)


@pytest.mark.slow
def test_the_choice_is_compiled_with_the_layer() -> None:
    """One compiled layer takes rows of both kinds, each with its own kernel."""
    layers = torch.nn.ModuleList([Attending()])
    choose_kernels(layers)
    layers[0].forward = torch.compile(layers[0].forward, dynamic=True, backend="eager")
    for tokens, fused in ((300, True), (22, False), (400, True), (250, False)):
        layers[0](torch.randn(2, tokens, 32, dtype=torch.bfloat16))
        assert layers[0].fused == fused
