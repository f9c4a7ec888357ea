"""What quantised frozen layers cost and give: memory, time and error against the same encoder unquantised.

    python benchmarks/quantize.py

Two encoders, float32 on a CPU and bf16 on a GPU: the packaged MiniLM with its pretrained weights, on the demo's
sentences, and a T5-large-shaped one (335 M parameters) with random weights, on random tokens. Each stands in four
forms: `none`; `int8`, this project's `engine.quantize`; `int8, torchao`, the same matrices in torchao's own product;
and `nf4, torchao`, 4 bits (the last two only where torchao is installed). A step is a forward pass and the backward
pass to the prompt; the forms take their steps in turns, so that what else the machine does falls on all of
them. Printed and kept in `quantize.json`:

* layers MiB: storages behind the layers' parameters;
* kept MiB: what autograd holds besides between the two passes;
* step ms: median and least of `--steps`;
* logit error: length of the difference as a share of the logits', over 64 random heads;
* gradient cosine: of the prompt's gradient with the unquantised one.

T5 leaves the scale of its attention scores to its query weights, so the random ones are given it. Without, the
encoder is chaotic and no error means anything: noise of 1e-4 of each weight changes its output by 33 %, rounding the
weights to bf16 by 89 % (with it: 0.06 % and 1.1 %).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import machine
from tabulate import tabulate
from torch import Tensor, nn

from gpc_dist.adapter.families import EncoderParts, locate
from gpc_dist.adapter.graft import GraftedEncoder
from gpc_dist.adapter.make import new_adapter
from gpc_dist.bench.machine import synchronize
from gpc_dist.config import AdapterConfig, EncoderConfig
from gpc_dist.encoder.frozen import encoder_path, load_tokenizer
from gpc_dist.encoder.quantize import quantize_layer
from gpc_dist.encoder.shapes import known_config
from gpc_dist.encoder.skeleton import build_skeleton, fill_random, freeze
from gpc_dist.shipped import shipped_folder

HEADS = 64
PROMPT_TOKENS = 20
ROWS = 4
TEXT_TOKENS = 44  # of a random row: 64 with the prompt
FORMS = ("none", "int8") + ("int8, torchao", "nf4, torchao") * (find_spec("torchao") is not None)
ENCODERS = ("minilm", "t5-v1_1-large")


def encoder_and_batch(
    name: str, dtype: torch.dtype, device: torch.device
) -> tuple[EncoderParts, dict[str, Tensor]]:
    if name == "minilm":
        from transformers import AutoModel

        config = EncoderConfig(path=name)
        parts = locate(freeze(AutoModel.from_pretrained(encoder_path(config), dtype=dtype)).to(device))
        lines = (
            (shipped_folder("recipes") / "demo_data" / "validation.jsonl")
            .read_text(encoding="utf-8")
            .splitlines()[:ROWS]
        )
        texts = [json.loads(line)["text"] for line in lines]
        return parts, dict(load_tokenizer(config)(texts, padding=True, return_tensors="pt").to(device))
    parts = build_skeleton(known_config(name), dtype)
    fill_random(parts, device)
    with torch.no_grad():
        for parameter_name, parameter in parts.encoder.named_parameters():
            if parameter_name.endswith("SelfAttention.q.weight"):
                parameter.mul_(parts.encoder.config.d_kv**-0.5)  # type: ignore[union-attr, operator]
    ids = torch.randint(10, 30000, (ROWS, TEXT_TOKENS), generator=torch.Generator().manual_seed(0))
    return parts, {"input_ids": ids.to(device)}


def convert(layers: nn.ModuleList, form: str) -> None:
    if "torchao" in form:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_, to_nf4

    for layer in layers:
        if form == "int8":
            quantize_layer(layer, "int8")
        elif form == "int8, torchao":
            quantize_(layer, Int8WeightOnlyConfig(version=2, set_inductor_config=False))
        elif form == "nf4, torchao":
            for linear in [m for m in layer.modules() if type(m) is nn.Linear]:
                linear.weight = nn.Parameter(to_nf4(linear.weight.data), requires_grad=False)


def graft(parts: EncoderParts, device: torch.device) -> GraftedEncoder:
    """With the same adapter for every form of an encoder."""
    model = GraftedEncoder(parts, [])
    adapter = new_adapter(model, AdapterConfig(prompt_tokens=PROMPT_TOKENS), outputs=HEADS).to(device)
    nn.init.zeros_(adapter.head.linear.bias)  # the error is a share of what the encoder says alone
    model.lanes.append(adapter)
    return model


def memory(model: GraftedEncoder, batch: dict[str, Tensor]) -> dict[str, float]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(**batch)
    parameters = storages([*model.parameters(), *model.buffers()])
    kept = {address: size for address, size in storages(saved).items() if address not in parameters}
    return {
        "layers_mib": sum(
            storages([*model.parts.layers.parameters(), *model.parts.layers.buffers()]).values()
        )
        / 2**20,
        "kept_mib": sum(kept.values()) / 2**20,
    }


def step(model: GraftedEncoder, batch: dict[str, Tensor]) -> tuple[float, Tensor, Tensor]:
    """Seconds of a step, its logits, and the prompt's gradient."""
    device = batch["input_ids"].device
    model.zero_grad()
    synchronize(device)
    start = time.perf_counter()
    logits = model(**batch)
    nn.functional.cross_entropy(logits, torch.arange(len(logits), device=device)).backward()
    synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, logits.detach(), model.adapter.prompt.start.grad.clone()  # type: ignore[union-attr]


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of every storage behind tensors, those inside torchao's included: address -> bytes."""
    found = {}
    for tensor in tensors:
        wrapped = hasattr(tensor, "__tensor_flatten__")
        inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]] if wrapped else [tensor]
        found |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in inner}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--encoders", nargs="+", default=ENCODERS, choices=ENCODERS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()

    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    report: dict[str, Any] = {
        "machine": machine(),
        "settings": {
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "steps": options.steps,
        }
        | {"rows": ROWS, "prompt_tokens": PROMPT_TOKENS, "threads": torch.get_num_threads()},
        "runs": [],
    }
    for name in options.encoders:
        parts, batch = encoder_and_batch(name, dtype, device)
        models = {}
        for form in FORMS:
            stood = locate(copy.deepcopy(parts.encoder))
            convert(stood.layers, form)
            models[form] = graft(stood, device)
        held = {form: memory(model, batch) for form, model in models.items()}
        turns = [{form: step(model, batch) for form, model in models.items()} for _ in range(options.steps)]
        _, plain_logits, plain_gradient = turns[0]["none"]
        for form in FORMS:
            seconds = [turn[form][0] for turn in turns]
            _, logits, gradient = turns[0][form]
            cosine = nn.functional.cosine_similarity(gradient.flatten(), plain_gradient.flatten(), dim=0)
            report["runs"].append(
                {
                    "encoder": name,
                    "form": form,
                    **held[form],
                    "step_ms": 1000 * statistics.median(seconds),
                    "least_step_ms": 1000 * min(seconds),
                    "logit_error": float((logits - plain_logits).norm() / plain_logits.norm()),
                    "gradient_cosine": float(cosine),
                }
            )
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(tabulate(report["runs"], headers="keys", floatfmt=".4g"))


if __name__ == "__main__":
    main()
