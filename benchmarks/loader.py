"""From checkpoint file to sharded encoder: GPC-Dist's loader against transformers' own under ZeRO-3.

    python benchmarks/loader.py

Writes a T5-large-shaped encoder (335 M parameters, bf16, random values) as safetensors, and the same tensors as
`pytorch_model.bin`, and loads it, sharded over 1, 2 and 4 CPU ranks, on all sides in turns, `--repeats` times: with
transformers and GPC-Dist from safetensors, and with GPC-Dist from the `.bin` (`bin`), which may take 1.5 times as much
as from safetensors. Printed and kept in `loader.json`: seconds from the configuration to the sharded model (the slowest
rank, the median of the repeats) and the peak of resident memory above the same process before loading (VmHWM, the
largest rank); the files are in the page cache on all sides. Imports are done before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine
from tabulate import tabulate

SHAPE = "t5-v1_1-large"
RANKS = (1, 2, 4)
SIDES = ("transformers", "ours", "bin")


def write_checkpoints(safe: Path, pickled: Path, shape: str) -> int:
    """An encoder of this shape with random weights, in both formats; returns its bytes."""
    import torch
    from safetensors.torch import save_file

    from gpc_dist.encoder.shapes import known_config
    from gpc_dist.encoder.skeleton import skeleton_model

    config = known_config(shape)
    config.architectures = ["T5EncoderModel"]
    for folder in (safe, pickled):
        config.save_pretrained(folder)
    model = skeleton_model(config, torch.bfloat16)
    tensors = {name: torch.randn(p.shape).bfloat16() for name, p in model.named_parameters()}
    save_file(tensors, safe / "model.safetensors", metadata={"format": "pt"})
    torch.save(tensors, pickled / "pytorch_model.bin")
    return sum(tensor.nbytes for tensor in tensors.values())


def load_ours(folder: Path, ds_config: dict[str, Any]) -> Any:
    import torch

    from gpc_dist.config import build
    from gpc_dist.distributed.world import World
    from gpc_dist.encoder import frozen

    engine = build({"engine": {"device": "cpu", "zero_stage": 3}}).engine
    encoder = build({"encoder": {"path": str(folder)}}).encoder
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 0, torch.device("cpu"))
    loaded = frozen.load_encoder(encoder, torch.bfloat16, world)
    frozen.place(loaded, world, engine, ds_config)
    return loaded.parts.encoder


def load_peer(folder: Path, ds_config: dict[str, Any]) -> Any:
    """As transformers documents it: a live HfDeepSpeedConfig makes `from_pretrained` shard while it loads."""
    import deepspeed
    import torch
    from transformers import T5EncoderModel
    from transformers.integrations import HfDeepSpeedConfig

    live = HfDeepSpeedConfig(ds_config)
    model = T5EncoderModel.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)
    deepspeed.initialize(model=model, config=ds_config)
    del live
    return model


def run_rank(side: str, folder: Path, out: Path) -> None:
    """Load on this rank; rank 0 writes what all ranks measured."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import torch
    import torch.distributed as dist
    from transformers import T5EncoderModel  # noqa: F401  imports are not what is measured

    from gpc_dist.config import build
    from gpc_dist.distributed import deepspeed_config
    from gpc_dist.encoder import frozen  # noqa: F401

    deepspeed.ops.__compatible_ops__ = {}  # its shared-memory operator would be compiled on first use
    deepspeed.utils.logging.set_log_level_from_string("error")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    config = build({"engine": {"zero_stage": 3, "device": "cpu"}})
    ds_config = deepspeed_config.resolve(config, dist.get_world_size(), torch.bfloat16)
    dist.barrier()
    before_mib = _reset_peak_mib()
    start = time.perf_counter()
    model = (load_peer if side == "transformers" else load_ours)(folder, ds_config)
    seconds = time.perf_counter() - start
    mine = {"seconds": seconds, "peak_mib": _status_mib("VmHWM") - before_mib}
    shard = sum(p.ds_tensor.nbytes for p in model.parameters() if hasattr(p, "ds_tensor"))
    mine["shard_mib"] = shard / 2**20
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


def _reset_peak_mib() -> float:
    """Forget the peak so far; returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_mib("VmRSS")


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise ValueError(field)


def measure(side: str, ranks: int, folder: Path, scratch: Path) -> dict[str, float]:
    from gpc_dist.distributed.launch import start_ranks

    out = scratch / "rank.json"
    command = [sys.executable, __file__, "--rank-of", side, "--folder", str(folder), "--out", str(out)]
    if code := start_ranks(command, ranks):
        raise SystemExit(f"{side} on {ranks} ranks ended with exit code {code}")
    found = json.loads(out.read_text())
    return {key: max(rank[key] for rank in found) for key in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default=SHAPE)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--rank-of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        run_rank(options.rank_of, options.folder, options.out)
        return
    lines, report = [], []
    with tempfile.TemporaryDirectory() as scratch:
        safe, pickled = Path(scratch) / "safe", Path(scratch) / "pickled"
        size_mib = write_checkpoints(safe, pickled, options.shape) / 2**20
        for ranks in RANKS:
            found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
            for _ in range(options.repeats):
                for side, runs in found.items():
                    folder = pickled if side == "bin" else safe
                    runs.append(measure(side, ranks, folder, Path(scratch)))
            sides = {
                side: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                for side, runs in found.items()
            }
            keys = ("seconds", "peak_mib")
            ratios = {key: sides["ours"][key] / sides["transformers"][key] for key in keys}
            bin_ratios = {key: sides["bin"][key] / sides["ours"][key] for key in keys}
            report.append(
                {"ranks": ranks, **sides, "ratios": ratios, "bin_ratios": bin_ratios, "runs": found}
            )
            row: list[float] = [ranks]
            for key in keys:
                row += [*(sides[side][key] for side in SIDES), ratios[key], bin_ratios[key]]
            lines.append([*row, sides["ours"]["shard_mib"]])
    measured = ["transformers", "ours", "ours, .bin", "ours / transformers", ".bin / safetensors"]
    headers = ["ranks", *(f"{what}\n{side}" for what in ("s", "peak MiB") for side in measured), "shard MiB"]
    print(tabulate(lines, headers=headers, floatfmt=".2f"))
    settings = {"shape": options.shape, "checkpoint_mib": size_mib, "repeats": options.repeats}
    options.out.write_text(
        json.dumps({"machine": machine(), "settings": settings, "results": report}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
