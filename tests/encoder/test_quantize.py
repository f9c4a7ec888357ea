"""Quantised frozen layers: how far they are from the plain ones, what they hold, and that adapters train on them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpc_dist.adapter.families import EncoderParts, locate
from gpc_dist.adapter.graft import GraftedEncoder
from gpc_dist.adapter.make import new_adapter
from gpc_dist.config import AdapterConfig, EncoderConfig, build
from gpc_dist.distributed.world import World
from gpc_dist.encoder.frozen import encoder_path, load_encoder, place
from gpc_dist.encoder.quantize import QuantizedLinear, quantize_layer
from tests.adapter.encoders import batch_for, tiny
from tests.conftest import gpc, losses

SENTENCES = [
    "The cat sat on the mat.",
    "No.",
    "Where is the nearest railway station, and when does the last train leave?",
    "Stocks fell sharply on Monday after the central bank raised its rates by half a point.",
    "She reads a letter in the garden under the old green tree.",
]


def quantized(parts: EncoderParts) -> EncoderParts:
    """A copy of an encoder, all its layers quantised."""
    encoder = copy.deepcopy(parts.encoder)
    found = locate(encoder)
    for layer in found.layers:
        quantize_layer(layer, "int8")
    return found


def graft(parts: EncoderParts) -> GraftedEncoder:
    """With an adapter whose logits are about 1 and whose cell does nothing yet, equal for every copy of an encoder."""
    model = GraftedEncoder(parts, [])
    adapter = new_adapter(model, AdapterConfig(prompt_tokens=8, cell="residual"), outputs=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        adapter.head.linear.weight.normal_(std=parts.shape.hidden_size**-0.5, generator=generator)
    model.lanes.append(adapter)
    return model


def logits_and_gradient(model: GraftedEncoder, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a loss with respect to the prompt, which went through every layer."""
    logits = model(**batch)
    loss = nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])
    (gradient,) = torch.autograd.grad(loss, [model.adapter.prompt.start])
    return logits.detach(), gradient


def distance(a: Tensor, b: Tensor) -> float:
    """Length of the difference as a share of b's."""
    return float((a - b).detach().norm() / b.detach().norm())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def storages(tensors: Iterator[Tensor] | list[Tensor]) -> dict[int, int]:
    """Bytes of every storage behind tensors: address -> bytes."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.fixture(scope="module")
def minilm() -> EncoderParts:
    from transformers import AutoModel

    model: Any = AutoModel.from_pretrained(encoder_path(EncoderConfig(path="minilm")))
    return locate(model.requires_grad_(False).eval())


@pytest.fixture(scope="module")
def sentences() -> dict[str, Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder_path(EncoderConfig(path="minilm")))
    return dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))


def test_logits_and_gradients_of_a_real_encoder_stay_close(
    minilm: EncoderParts, sentences: dict[str, Tensor]
) -> None:
    expected, expected_gradient = logits_and_gradient(graft(minilm), sentences)
    logits, gradient = logits_and_gradient(graft(quantized(minilm)), sentences)
    # measured: 0.047 and 0.9985; 0.02 to 0.06 with other heads
    assert distance(logits, expected) < 0.06
    assert cosine(gradient, expected_gradient) > 0.997


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.26), (torch.bfloat16, 0.52)])
def test_layers_hold_a_byte_per_weight_and_nothing_else(
    minilm: EncoderParts, dtype: torch.dtype, share: float
) -> None:
    plain = copy.deepcopy(minilm.layers).to(dtype)
    before = sum(storages(plain.parameters()).values())
    matrices = [m.weight.shape for m in plain.modules() if isinstance(m, nn.Linear)]
    rest = sum(p.nbytes for p in plain.parameters()) - sum(s.numel() for s in matrices) * dtype.itemsize
    for layer in plain:
        quantize_layer(layer, "int8")
    held = sum(storages([*plain.parameters(), *plain.buffers()]).values())
    assert held == rest + sum(s.numel() + 4 * s[0] for s in matrices)
    assert held < share * before


def test_a_loaded_encoder_keeps_no_floating_point_matrix(tiny_encoder: Path) -> None:
    """Whatever the loader remembers of a matrix, it must not be its values."""
    config = build({"encoder": {"path": str(tiny_encoder)}, "engine": {"quantize": "int8", "device": "cpu"}})
    world = World(0, 1, 0, torch.device("cpu"))
    encoder = load_encoder(config.encoder, torch.bfloat16, world)  # not the file's dtype: nothing is mapped
    matrices = [m.weight for layer in encoder.parts.layers for m in layer.modules() if type(m) is nn.Linear]
    place(encoder, world, config.engine, {"zero_optimization": {"stage": 0}})
    assert {matrix.dtype for matrix in matrices} == {torch.int8}
    assert encoder.places is not None
    held = [p for p in encoder.places if p.dim() == 2 and p.is_floating_point()]
    tables = [p for p in encoder.parts.encoder.parameters() if p.dim() == 2 and p.is_floating_point()]
    assert {id(p) for p in held} <= {id(p) for p in tables}


_RESIDENT = """
import torch
from torch import nn
from gpc_dist.distributed.memory import return_freed_memory
from gpc_dist.encoder.quantize import quantize_layer

return_freed_memory()

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

quantize_layer(nn.Sequential(nn.Linear(8, 8)).requires_grad_(False), "int8")  # what a first use takes
start = resident()
layers = [nn.Sequential(nn.Linear(1024, 2816)).requires_grad_(False) for _ in range(16)]
plain = resident() - start
for layer in layers:
    quantize_layer(layer, "int8")
print(plain, resident() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_resident_memory_falls_with_the_bytes() -> None:
    done = subprocess.run([sys.executable, "-c", _RESIDENT], capture_output=True, text=True, check=True)
    plain, small = map(int, done.stdout.split())
    assert plain > 170 * 2**20
    assert small < 0.35 * plain  # a quarter, and a copy or two of one matrix


def test_no_floating_point_matrix_is_kept_for_the_backward_pass(
    minilm: EncoderParts, sentences: dict[str, Tensor]
) -> None:
    def kept(parts: EncoderParts) -> int:
        """Bytes that autograd holds after the forward pass, weights left out."""
        found: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            graft(parts)(**sentences)
        weights = storages([*parts.encoder.parameters(), *parts.encoder.buffers()])
        return sum(size for address, size in storages(found).items() if address not in weights)

    assert kept(quantized(minilm)) <= kept(minilm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_dequantised_matrix(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(48, 32, bias=bias, dtype=dtype)).requires_grad_(False)
    quantize_layer(layer, "int8")
    x = torch.randn(2, 5, 48, dtype=dtype, requires_grad=True)
    output, upstream = layer(x), torch.randn(2, 5, 32, dtype=dtype)
    (gradient,) = torch.autograd.grad(output, x, upstream)
    linear: Any = layer[0]
    assert output.dtype == gradient.dtype == dtype
    exact = linear.weight.float() * linear.scale[:, None]
    shift = linear.bias.float() if bias else None
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3  # twice the rounding of bfloat16
    assert distance(output.float(), nn.functional.linear(x.float(), exact, shift)) < tolerance
    assert distance(gradient.float(), upstream.float() @ exact) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["albert", "bert", "deberta-v2", "modernbert", "t5", "umt5"])
def test_families(family: str, dtype: torch.dtype) -> None:
    plain = locate(tiny(family).to(dtype))
    small = quantized(plain)
    batch = batch_for(family)
    expected, expected_gradient = logits_and_gradient(graft(plain), batch)
    logits, gradient = logits_and_gradient(graft(small), batch)
    # measured: at most 0.025 (deberta-v2, bf16) and at least 0.989 (umt5, bf16)
    assert distance(logits, expected) < 0.035
    assert cosine(gradient, expected_gradient) > 0.98
    for layer in small.layers:
        assert not any(type(module) is nn.Linear for module in layer.modules())
    matrices = {f"{n}.weight" for n, m in small.encoder.named_modules() if isinstance(m, QuantizedLinear)}
    kept = dict(small.encoder.named_parameters())
    for name, parameter in plain.encoder.named_parameters():
        if name not in matrices:  # embeddings, norms, biases, T5's relative bias
            assert type(kept[name]) is nn.Parameter
            assert torch.equal(kept[name], parameter)


def test_recomputed_layers_give_the_same_gradient() -> None:
    model, batch = graft(quantized(locate(tiny("t5")))), batch_for("t5")
    expected = logits_and_gradient(model, batch)
    model.checkpoint_activations()
    torch.testing.assert_close(logits_and_gradient(model, batch), expected, rtol=1e-5, atol=1e-6)


def test_a_matrix_with_an_empty_row_stays_finite() -> None:
    layer = nn.Sequential(nn.Linear(4, 3, bias=False)).requires_grad_(False)
    layer[0].weight[1] = 0
    exact = layer[0].weight.clone()
    quantize_layer(layer, "int8")
    linear: Any = layer[0]
    step = exact.abs().amax(dim=1, keepdim=True) / 127
    assert ((linear.weight.float() * linear.scale[:, None] - exact).abs() <= step / 2 + 1e-7).all()


def test_an_unknown_kind_is_not_taken_for_int8() -> None:
    with pytest.raises(ValueError, match="int3"):
        quantize_layer(nn.Sequential(nn.Linear(2, 2)), "int3")


@pytest.fixture(scope="module")
def runs(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run on the plain and on the quantised encoder."""
    made = {}
    for kind in ("none", "int8"):
        made[kind] = tmp_path_factory.mktemp("runs") / kind
        options = ["--engine.quantize", kind, "--train.steps", 30, "--train.eval_every", 30]
        assert gpc("train", tiny_recipe, "--run.dir", made[kind], *options) == 0
    return made


def test_training_on_a_quantised_encoder_lowers_the_loss(runs: dict[str, Path]) -> None:
    curve = list(losses(runs["int8"]).values())
    assert curve != list(losses(runs["none"]).values())
    assert sum(curve[-5:]) < sum(curve[:5])


def test_its_adapter_is_an_ordinary_one(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    sizes, cards = {}, {}
    for kind, run in runs.items():
        sizes[kind] = (run / "adapter" / "adapter.safetensors").stat().st_size
        cards[kind] = json.loads((run / "adapter" / "adapter_config.json").read_text())["encoder"]
    assert sizes["int8"] == sizes["none"]
    assert cards["int8"] == cards["none"]
    expected = json.loads((runs["int8"] / "result.json").read_text())["metrics"]["best"]
    options = ["--engine.device", "cpu", "--engine.quantize", "int8"]
    assert gpc("evaluate", runs["int8"] / "adapter", *options) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"] == pytest.approx(expected)
