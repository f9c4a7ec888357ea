"""A training step on a CPU: the frozen encoder in bf16 against float32, with and without torch's fused attention.

    python benchmarks/cpu_bf16.py

The packaged MiniLM with one GPC lane, forward pass and backward pass to the adapter, for rows of 22 to 512 tokens
(prompt included) and about the same number of tokens a step. Three forms: `fp32`; `bf16`, as the program runs it on
a CPU (`gpc_dist.encoder.attention.kernels`); `bf16, fused`, the same with torch's fused kernel at every length. They
take their steps in turns, so that what else the machine does falls on all of them. Printed and kept in
`cpu_bf16.json`: the median of `--steps` in ms, and how many times faster `bf16` is than the others. Of use where the
processor has products in bf16 (AVX-512 BF16, AMX): elsewhere expect bf16 to be slower.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import machine
from tabulate import tabulate
from torch import nn
from transformers import AutoModel

from gpc_dist.adapter.families import locate
from gpc_dist.adapter.graft import GraftedEncoder
from gpc_dist.adapter.make import new_adapter
from gpc_dist.config import AdapterConfig, EncoderConfig
from gpc_dist.encoder.attention import choose_kernels
from gpc_dist.encoder.frozen import encoder_path
from gpc_dist.encoder.skeleton import freeze

STEP_TOKENS = 2816
LENGTHS = (22, 44, 88, 176, 256, 512)
PROMPT_TOKENS = 10


def graft(dtype: torch.dtype, short_scores: bool) -> GraftedEncoder:
    encoder = AutoModel.from_pretrained(encoder_path(EncoderConfig(path="minilm")), dtype=dtype)
    parts = locate(freeze(encoder))
    if short_scores:
        choose_kernels(parts.layers)
    model = GraftedEncoder(parts, [])
    model.lanes.append(new_adapter(model, AdapterConfig(prompt_tokens=PROMPT_TOKENS), outputs=2))
    return model


def step_ms(model: GraftedEncoder, ids: torch.Tensor) -> float:
    model.zero_grad()
    start = time.perf_counter()
    nn.functional.cross_entropy(model(ids), torch.zeros(len(ids), dtype=torch.long)).backward()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()

    models = {
        "fp32": graft(torch.float32, False),
        "bf16": graft(torch.bfloat16, True),
        "bf16, fused": graft(torch.bfloat16, False),
    }
    report: dict[str, Any] = {
        "machine": machine(),
        "settings": {"steps": options.steps, "threads": torch.get_num_threads()},
        "runs": [],
    }
    for length in LENGTHS:
        ids = torch.randint(1000, 30000, (STEP_TOKENS // length, length - PROMPT_TOKENS))
        turns = [
            {form: step_ms(model, ids) for form, model in models.items()} for _ in range(options.steps + 1)
        ]
        ms = {form: statistics.median(turn[form] for turn in turns[1:]) for form in models}
        report["runs"].append(
            {"tokens": length, "rows": len(ids)}
            | ms
            | {f"times {form}": ms[form] / ms["bf16"] for form in ("fp32", "bf16, fused")}
        )
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(tabulate(report["runs"], headers="keys", floatfmt=".3g"))


if __name__ == "__main__":
    main()
