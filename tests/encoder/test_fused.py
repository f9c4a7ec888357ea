"""Fused elementwise chains: the same values and gradients, less kept for the backward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertModel, T5Config, T5EncoderModel

from gpc_dist.encoder.fused import fuse_elementwise


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


def albert() -> nn.Module:
    config = AlbertConfig(
        vocab_size=50,
        embedding_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_act="gelu_new",
    )
    return AlbertModel(config, add_pooling_layer=False)


def run(model: nn.Module, embeds: Tensor) -> tuple[Tensor, Tensor, int]:
    """States, the gradient of a weighted sum of them, and bytes kept for it."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    embeds = embeds.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        states = model(inputs_embeds=embeds).last_hidden_state
    weights = torch.linspace(-1, 1, states.shape[-1], device=states.device, dtype=states.dtype)
    (states * weights).sum().backward()
    assert embeds.grad is not None
    return states.detach(), embeds.grad, kept


def compare(model: nn.Module, embeds: Tensor, tolerance: float) -> None:
    model = model.requires_grad_(False).eval()
    states, gradient, kept = run(model, embeds)
    fused = copy.deepcopy(model)
    fuse_elementwise(fused)
    fused_states, fused_gradient, fused_kept = run(fused, embeds)
    torch.testing.assert_close(fused_states, states, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        fused_gradient, gradient, rtol=tolerance, atol=tolerance * gradient.abs().max().item()
    )
    assert fused_kept < kept


@pytest.mark.parametrize("make", [t5, albert])
def test_values_and_gradients_stay_and_less_is_kept(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    compare(make(), torch.randn(3, 7, 32), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_the_norm_too_on_a_gpu(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    model = t5().to("cuda", dtype)
    compare(model, torch.randn(3, 7, 32, device="cuda", dtype=dtype), tolerance)
