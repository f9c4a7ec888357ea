"""What it gives to keep parts of a sharded encoder resident, on 2 CPU ranks.

    python benchmarks/residency.py

Two choices of ZeRO-3. The table of token embeddings: gathered for each step as any other weight, or whole on every
rank, as this program keeps it (on a CPU a view of the checkpoint file). And small tensors (norms, biases): gathered
with their layer, or kept once gathered (`stage3_param_persistence_threshold`). Printed and kept in `residency.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine
from tabulate import tabulate

RANKS = 2
ROWS, TOKENS = 8, 64


def table_rank(out: Path, vocabulary: int, width: int, repeats: int) -> None:
    """On one rank: milliseconds to look up a step's rows, with and without gathering the table first."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    shard = torch.randn(vocabulary * width // RANKS)
    whole = torch.empty(vocabulary * width)
    ids = torch.randint(vocabulary, (ROWS, TOKENS))
    seconds: dict[str, list[float]] = {"gathered": [], "resident": []}
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        dist.all_gather_into_tensor(whole, shard)
        torch.nn.functional.embedding(ids, whole.view(vocabulary, width))
        seconds["gathered"].append(time.perf_counter() - start)
        start = time.perf_counter()
        torch.nn.functional.embedding(ids, whole.view(vocabulary, width))
        seconds["resident"].append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        out.write_text(json.dumps({key: 1000 * statistics.median(values) for key, values in seconds.items()}))
    dist.destroy_process_group()


def measure_table(vocabulary: int, width: int, scratch: Path) -> dict[str, Any]:
    from gpc_dist.distributed.launch import start_ranks

    out = scratch / "table.json"
    command = [sys.executable, __file__, "--table-rank", str(out), str(vocabulary), str(width)]
    if code := start_ranks(command, RANKS):
        raise SystemExit(code)
    mib = vocabulary * width * 4 / 2**20
    return {"table_mib": mib, "step_ms": json.loads(out.read_text()), "gathered_keeps_mib": mib / RANKS}


def measure_persistence(shape: str, threshold: int, steps: int, scratch: Path) -> dict[str, Any]:
    """One `gpc-dist bench` at stage 3 with this threshold."""
    from gpc_dist.shipped import shipped_folder

    regime = json.loads((shipped_folder("ds_configs") / "zero3.json").read_text())
    regime["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    # far below the encoder's size, so that layers are let go as those of a large encoder are
    regime["zero_optimization"] |= {"stage3_max_live_parameters": 10**7, "stage3_max_reuse_distance": 10**7}
    (scratch / "regime.json").write_text(json.dumps(regime))
    out = scratch / "bench.json"
    settings = {
        "engine.ranks": RANKS,
        "engine.device": "cpu",
        "engine.zero_stage": 3,
        "engine.ds_config": scratch / "regime.json",
        "train.batch_size": ROWS,
        "data.max_length": TOKENS,
        "adapter.cell_rank": 32,
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "gpc_dist", "bench", "demo", "--shape", shape, "--steps", str(steps)]
    subprocess.run([*command, "--json", str(out), *words], check=True, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="t5-v1_1-small")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--table-rank", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table_rank:
        out, vocabulary, width = options.table_rank
        table_rank(Path(out), int(vocabulary), int(width), options.steps)
        return
    report: dict[str, Any] = {"machine": machine(), "shape": options.shape}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        report["table"] = table = measure_table(32128, 2048, scratch)
        report["persistence"] = {
            threshold: measure_persistence(options.shape, threshold, options.steps, scratch)
            for threshold in (0, 100_000)
        }
    print(
        tabulate(
            [["gathered", table["step_ms"]["gathered"], table["gathered_keeps_mib"]]]
            + [["resident", table["step_ms"]["resident"], table["table_mib"]]],
            headers=["token table 32128 x 2048", "ms a step", "MiB a rank"],
            floatfmt=".1f",
        )
    )
    lines = [[threshold, run["step_ms"]] for threshold, run in report["persistence"].items()]
    print(tabulate(lines, headers=["persistence threshold", "step ms"], floatfmt=".0f"))
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
