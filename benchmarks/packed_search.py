"""Eight trials in the lanes of one encoder against the same eight one after the other, and two at a time.

The search draws eight configurations of a task (learning rates, cells, clipping, seed) and runs them packed, as
`gpc-dist tune` does; then each trial's own configuration is run by `gpc-dist train`. All sides use the same ranks,
ZeRO stage, steps and data, record in MLflow as they do by default, and are timed from the command to its end.

    python benchmarks/packed_search.py --recipe sst2 --data GLUE/sst2
    python benchmarks/packed_search.py --data GLUE/sst2 --batch-sizes 4 --first-layers 0 3 --brief --json late.json

With late prompts each side starts without text states, and computes them once. Memory is the peak of what all
processes of a side hold together (proportional set size: shared pages count once), sampled every three seconds. All
sides are measured once for each batch size and first layer. `packed_search.json` beside this script keeps the figures
with the machine's description.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import yaml
from common import machine
from tabulate import tabulate

TRIALS = 8
_SAMPLE_S = 3.0
"""Between looks at memory, which cost the processes time: a search has twenty of them."""


@dataclass
class Cost:
    """Of one side."""

    wall_s: float
    peak_mib: float
    """Of all processes together."""


def measure(commands: Sequence[Sequence[object]], at_once: int, log: Path) -> Cost:
    """Run commands, so many at a time, and see what they take."""
    pending, running, peak = list(commands), [], 0.0
    own = {"OMP_NUM_THREADS": "1", "GPC_DIST_CACHE": tempfile.mkdtemp(dir=log.parent)}
    start_s = time.monotonic()
    with log.open("ab") as out:
        while pending or running:
            while pending and len(running) < at_once:
                words = [sys.executable, "-m", "gpc_dist", *map(str, pending.pop(0))]
                running.append(psutil.Popen(words, stdout=out, stderr=out, env=os.environ | own))
            time.sleep(_SAMPLE_S)
            peak = max(peak, sum(map(held_mib, running)))
            for process in [process for process in running if process.poll() is not None]:
                if process.returncode:
                    raise SystemExit(f"{' '.join(process.args)} failed: see {log}")
                running.remove(process)
    cost = Cost(time.monotonic() - start_s, peak)
    print(f"{len(commands)} command(s), {at_once} at once: {cost.wall_s:.0f} s, {peak:.0f} MiB", flush=True)
    return cost


def held_mib(process: psutil.Process) -> float:
    """Proportional set size of a process and all that it has started, MiB."""
    total = 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for member in family:
        try:
            total += member.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 2**20


def search(options: argparse.Namespace, batch_size: int, first_layer: int) -> dict[str, Any]:
    """The search whose trials all sides run."""
    return {
        "recipe": options.recipe,
        "settings": {
            "data.path": str(options.data.resolve()),
            "adapter.first_layer": first_layer,
            "train.steps": options.steps,
            "train.batch_size": batch_size,
            "train.eval_batch_tokens": options.eval_batch_tokens,
            "train.eval_every": options.steps,
            "data.limit_eval": options.limit_eval,
            "engine.zero_stage": options.stage,
            "engine.device": options.device,
        },
        "space": {
            "train.lr": {"loguniform": [1e-3, 3e-2]},
            "train.cell_lr": {"loguniform": [1e-4, 1e-3]},
            "train.clip_norm": [0.5, 1.0],
            "adapter.cell": ["residual", "gated", "recurrent"],
        },
        "trials": TRIALS,
        "resources": {"ranks": options.ranks, "pack": TRIALS},
    }


def final(folder: Path) -> dict[str, float]:
    """Metrics of a run's last evaluation."""
    return json.loads((folder / "result.json").read_text())["metrics"]["last"]


def run(options: argparse.Namespace, batch_size: int, first_layer: int, scratch: Path) -> dict[str, Any]:
    """All sides at one batch size and first layer."""
    specification, log = scratch / "packed.yaml", scratch / "log"
    specification.write_text(yaml.safe_dump(search(options, batch_size, first_layer)))
    costs = {"packed": measure([["tune", specification, "--dir", scratch / "packed"]], 1, log)}
    trials = sorted((scratch / "packed" / "trials").iterdir())

    def alone(side: str) -> list[list[object]]:
        return [
            ["train", trial / "config.yaml", "--run.dir", scratch / side / trial.name] for trial in trials
        ]

    costs["one after the other"] = measure(alone("one after the other"), 1, log)
    if not options.brief:
        single = ["--trials", 1, "--resources.pack", 1]
        costs["a search of one trial"] = measure(
            [["tune", specification, "--dir", scratch / "single", *single]], 1, log
        )
        costs["one trial"] = measure(alone("one trial")[:1], 1, log)
        costs["two at a time"] = measure(alone("two at a time"), 2, log)
    metrics = {
        side: [final(folder / trial.name) for trial in trials]
        for side, folder in [
            ("packed", scratch / "packed" / "trials"),
            ("alone", scratch / "one after the other"),
        ]
    }
    return {
        "batch_size": batch_size,
        "first_layer": first_layer,
        "sides": {side: asdict(cost) for side, cost in costs.items()},
        **{
            f"times_faster_than_{side.replace(' ', '_')}": costs[side].wall_s / costs["packed"].wall_s
            for side in ("one after the other", "two at a time")
            if side in costs
        },
        **{
            f"times_the_memory_of_{side.replace(' ', '_')}": costs["packed"].peak_mib / costs[side].peak_mib
            for side in ("one trial", "a search of one trial")
            if side in costs
        },
        "metrics": metrics,
    }


def show(result: dict[str, Any]) -> None:
    print(f"\nbatch size {result['batch_size']}, first layer {result['first_layer']}")
    rows = [[side, cost["wall_s"], cost["peak_mib"]] for side, cost in result["sides"].items()]
    print(tabulate(rows, headers=["side", "seconds", "MiB of all processes"], floatfmt=".0f"))
    for key in (key for key in result if key.startswith("times_")):
        print(f"{key.replace('_', ' ')}: {result[key]:.2f}")
    names = list(result["metrics"]["packed"][0])
    rows = [
        [number, *(value for name in names for value in (packed[name], alone[name]))]
        for number, (packed, alone) in enumerate(zip(*result["metrics"].values(), strict=True))
    ]
    headers = ["trial", *(f"{name}, {side}" for name in names for side in ("packed", "alone"))]
    print(tabulate(rows, headers=headers, floatfmt=".4f"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the task's splits")
    parser.add_argument("--recipe", default="sst2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--first-layers", type=int, nargs="+", default=[0])
    parser.add_argument("--brief", action="store_true", help="packed, and one after the other, alone")
    parser.add_argument("--eval-batch-tokens", type=int, default=2048, help="bounds an evaluation's memory")
    parser.add_argument("--limit-eval", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    loops = ("batch_sizes", "first_layers")
    report = {
        "options": {key: value for key, value in vars(options).items() if key not in ("json", *loops)}
        | {"data": options.data.name},
        "machine": machine(),
        "results": [],
    }
    for batch_size, first_layer in product(options.batch_sizes, options.first_layers):
        with tempfile.TemporaryDirectory() as scratch:
            report["results"].append(run(options, batch_size, first_layer, Path(scratch)))
        show(report["results"][-1])
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
