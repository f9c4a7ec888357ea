"""The planner's memory against what ranks really take.

    python benchmarks/plan_error.py

Writes an encoder of `--shape` (T5-large: 335 M parameters, random values) in bf16, and trains an adapter on it for a
few steps in each of the cases below, every one in processes of its own. Measured is the most memory of a rank, the
larger of all ranks: on a GPU what its allocator handed out; on a CPU what was resident (VmHWM) above the same
process before it loaded anything, with glibc told to give freed memory back (MALLOC_MMAP_THRESHOLD_): left
alone, its heap keeps some, which says nothing about what is in use. Predicted is the total of `gpc-dist plan`
for the same regime and rows, which knows the encoder's configuration only. Printed and kept in
`plan_error.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import machine
from tabulate import tabulate

STEPS = 4


@dataclass(frozen=True)
class Case:
    """A regime, and a batch for it."""

    dtype: str
    ranks: int
    zero_stage: int
    recompute: bool
    rows: int
    tokens: int

    def settings(self, folder: Path) -> dict[str, Any]:
        return {
            "encoder": {"path": str(folder)},
            "data": {"max_length": self.tokens},
            "adapter": {"prompt_tokens": 20, "prompt_init": "vocab"},
            "train": {"batch_size": self.rows * self.ranks},
            "engine": {
                "zero_stage": self.zero_stage,
                "activation_checkpointing": self.recompute,
                "dtype": self.dtype,
            },
        }


def cases(gpu: bool, dtypes: list[str], rows: int, tokens: int) -> list[Case]:
    # stage 3 needs several ranks, which is what CPUs are for
    ranks, stages = (1, (0,)) if gpu else (2, (0, 3))
    return [
        Case(dtype, ranks, stage, recompute, rows, tokens)
        for dtype in dtypes
        for stage in stages
        for recompute in (False, True)
    ]


def write_encoder(folder: Path, shape: str) -> None:
    """An encoder of this shape with random weights, and the demo's tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from gpc_dist.config import EncoderConfig
    from gpc_dist.encoder.frozen import encoder_path
    from gpc_dist.encoder.shapes import known_config
    from gpc_dist.encoder.skeleton import build_skeleton, fill_random

    config = known_config(shape)
    config.save_pretrained(folder)
    parts = build_skeleton(config, torch.bfloat16)
    fill_random(parts, torch.device("cpu"))
    tensors = dict(parts.encoder.named_parameters())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(encoder_path(EncoderConfig())).save_pretrained(folder)


def run_rank(case: Case, folder: Path, out: Path) -> None:
    """Train for a few steps; rank 0 writes the peaks of all ranks, in bytes."""
    import numpy as np
    import torch

    from gpc_dist.bench.synthetic import synthetic
    from gpc_dist.config import build
    from gpc_dist.distributed.optimizer import LaneOptimizer
    from gpc_dist.distributed.world import init_world
    from gpc_dist.encoder.shapes import known_config
    from gpc_dist.encoder.skeleton import build_skeleton
    from gpc_dist.tasks import make_task
    from gpc_dist.training.session import Split, load_base, open_session
    from gpc_dist.training.step import LaneExamples, backward, finish, prepare

    config = build(case.settings(folder) | {"task": {"text": ["text"], "labels": ["no", "yes"]}})
    world = init_world(config.engine)
    build_skeleton(known_config("t5-v1_1-small"), torch.float32)  # imports are not what is measured
    if case.zero_stage == 3:
        import deepspeed  # noqa: F401
    idle = _reset_peak(world.device)
    task, base = make_task(config.task, config.data), load_base(config, world)
    session = open_session(config, world, task, base)
    adapter = session.new_adapter(config)
    optimizer = LaneOptimizer(adapter, config.train, world, case.zero_stage)
    rows = case.rows * world.size
    vocabulary = session.model.token_embeddings.num_embeddings
    encoded = synthetic(np.full(rows, case.tokens), vocabulary, seed=0)
    for _ in range(STEPS):
        step = prepare(session, [LaneExamples(adapter, Split([], encoded), np.arange(rows), task.kind)])
        finish(session, [optimizer], backward(session, step))
    found = world.gather(_peak(world.device) - idle)
    if world.is_main:
        out.write_text(json.dumps(found))
    world.leave()


def _reset_peak(device: Any) -> int:
    """Forget the peak so far; returns the bytes in use now."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _peak(device: Any) -> int:
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise ValueError(field)


def measure(case: Case, folder: Path, scratch: Path) -> int:
    from gpc_dist.distributed.launch import start_ranks

    out = scratch / "peaks.json"
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--folder", str(folder)]
    if code := start_ranks([*command, "--out", str(out)], case.ranks):
        raise SystemExit(f"{case} ended with exit code {code}")
    return max(json.loads(out.read_text()))


def predict(case: Case, folder: Path, gpu: bool) -> dict[str, float]:
    from gpc_dist.config import build
    from gpc_dist.planner.devices import DEVICES
    from gpc_dist.planner.recipe import make_planner
    from gpc_dist.planner.regime import Regime
    from gpc_dist.planner.timing import Cluster

    device = DEVICES["h100" if gpu else "cpu"]
    planner = make_planner(build(case.settings(folder)), device, outputs=2)
    regime = Regime(case.zero_stage, recompute=case.recompute)  # type: ignore[arg-type]
    memory = planner.memory(regime, Cluster(device, 1, case.ranks), case.rows)
    return asdict(memory) | {"total": memory.total}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="t5-v1_1-large")
    parser.add_argument("--rows", type=int, default=4, help="of a rank at once")
    parser.add_argument("--tokens", type=int, default=128, help="of a row, without the prompt")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["fp32", "bf16"],
        help="fp32, and bf16 on a GPU; CPUs without bf16 units take minutes for a step",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        run_rank(Case(**json.loads(options.case)), options.folder, options.out)
        return
    from gpc_dist.distributed.launch import visible_gpus

    gpu = visible_gpus() > 0
    dtypes = options.dtypes or (["fp32", "bf16"] if gpu else ["fp32"])
    lines, report = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "encoder"
        folder.mkdir()
        write_encoder(folder, options.shape)
        for case in cases(gpu, dtypes, options.rows, options.tokens):
            measured, predicted = measure(case, folder, Path(scratch)), predict(case, folder, gpu)
            error_pct = 100 * (predicted["total"] / measured - 1)
            report.append(
                asdict(case) | {"measured": measured, "predicted": predicted, "error_pct": error_pct}
            )
            sizes = [f"{size / 2**20:,.0f}" for size in (measured, *predicted.values())]
            recompute = "yes" if case.recompute else "no"
            lines.append([case.dtype, case.ranks, case.zero_stage, recompute, *sizes, f"{error_pct:+.1f}"])
            print(lines[-1], file=sys.stderr)
            report_all = {"shape": options.shape, "machine": machine(), "steps": STEPS, "bytes": report}
            options.out.write_text(json.dumps(report_all, indent=1) + "\n")
    headers = ["dtype", "ranks", "stage", "recompute", "measured MiB", "frozen", "gathered", "activations"]
    print(tabulate(lines, [*headers, "trained", "workspace", "predicted", "error %"], disable_numparse=True))


if __name__ == "__main__":
    main()
