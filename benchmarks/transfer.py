r"""Tasks that start from each other's adapters (`adapter.init_from`): SST-2's for three tasks, and theirs for SST-2.

For prompt tuning and GPC, on the packaged MiniLM: one source adapter for each task, then each target from the source
and from nothing, with the same rows, order and head for the same seed. SST-2 starts from its own source as well, head
included: the control, which must gain. All runs on a target train at once in the lanes of one encoder. Steps and rates
are fixed before, the latter as the recipes have them; what is measured is the last step on the validation split, and
nothing is chosen on it.

    python benchmarks/transfer.py --data DATA --runs build/transfer
    gpc-dist similarity build/transfer/source/*/*/adapter --output build/transfer/similarity

`DATA` holds `glue` and `superglue`, with a folder for each task. The file is written after each task, and finished runs
in `--runs` are not made again. The second command made `transfer_similarity.json` and `transfer_similarity.png`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine
from tabulate import tabulate

from gpc_dist import config
from gpc_dist.config import Config
from gpc_dist.distributed.world import World, init_world
from gpc_dist.runs.folder import RunFolder
from gpc_dist.training.pack import Pack

HERE = Path(__file__).parent
METHODS = ("prompt-tuning", "gpc")
SOURCE_SEED = 0
WINDOW = 10
"""Steps at the start of training whose mean loss is kept."""
NOTHING = "nothing"
"""Where a run starts that has no source."""


@dataclass(frozen=True)
class Target:
    """A task, and the sizes of its runs."""

    data: str
    max_length: int
    source_steps: int
    """Of the adapter that others start from."""
    steps: int
    """Of a run that is compared."""
    sources: tuple[str, ...]
    """Tasks whose adapters it starts from."""


TASKS = {
    "cb": Target("superglue/CB", 64, source_steps=100, steps=60, sources=("sst2",)),
    "cola": Target("glue/cola", 24, source_steps=150, steps=100, sources=("sst2",)),
    "wic": Target("superglue/WiC", 48, source_steps=100, steps=60, sources=("sst2",)),
    "sst2": Target("glue/sst2", 48, source_steps=200, steps=60, sources=("sst2", "cb", "cola", "wic")),
}


def configuration(
    task: str,
    method: str,
    folder: Path,
    seed: int,
    steps: int,
    options: argparse.Namespace,
    source: Path | None,
) -> Config:
    """The configuration of a run.

    Args:
        source: the adapter that it starts from.
    """
    settings = {
        "data.path": str(options.data / TASKS[task].data),
        "data.max_length": str(TASKS[task].max_length),
        "data.limit_train": "4000",
        "data.limit_eval": str(options.rows),
        "adapter.method": method,
        "adapter.cell": "recurrent",
        "adapter.prompt_tokens": str(options.prompt_tokens),
        "adapter.init_from": "null" if source is None else str(source),
        "train.steps": str(steps),
        "train.batch_size": str(options.batch_size),
        "train.lr": str(options.lr),
        "train.eval_every": str(steps),
        "train.eval_batch_tokens": "4096",
        "train.log_every": "1",
        "engine.dtype": "bf16",
        "run.seed": str(seed),
        "run.dir": str(folder),
    }
    return config.load(task, settings)


def train(configs: Mapping[str, Config], world: World) -> None:
    """Train those of some runs on one task that have not finished, all together."""
    left = {name: each for name, each in configs.items() if not RunFolder(each.run.folder).result.is_file()}
    if not left:
        return
    pack = Pack(next(iter(left.values())), world)
    for name, each in left.items():
        pack.add(name, each, ["benchmarks/transfer.py"])
    while pack.names:
        pack.advance(pack.names)


def train_source(task: str, options: argparse.Namespace, world: World) -> None:
    steps = TASKS[task].source_steps
    train(
        {
            method: configuration(
                task, method, source_run(options.runs, task, method), SOURCE_SEED, steps, options, None
            )
            for method in METHODS
        },
        world,
    )


def source_run(runs: Path, task: str, method: str) -> Path:
    return runs / "source" / task / method


def train_target(task: str, options: argparse.Namespace, world: World) -> dict[str, Any]:
    """Train a task from each of its sources and from nothing; returns the figures by method and start."""
    configs, places = {}, {}
    for method in METHODS:
        for start in (NOTHING, *TASKS[task].sources):
            source = None if start == NOTHING else source_run(options.runs, start, method) / "adapter"
            for seed in options.seeds:
                name = f"{method}/{start}/{seed}"
                places[method, start, seed] = folder = options.runs / "target" / task / name
                configs[name] = configuration(task, method, folder, seed, TASKS[task].steps, options, source)
    train(configs, world)
    return {
        method: compared(
            {
                start: [measured(places[method, start, seed]) for seed in options.seeds]
                for start in (NOTHING, *TASKS[task].sources)
            }
        )
        for method in METHODS
    }


def measured(folder: Path) -> dict[str, float]:
    """The main metric and the loss after the last step, and the loss of the first steps of training."""
    run = RunFolder(folder)
    result = json.loads(run.result.read_text())
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    last = result["metrics"]["last"]
    return {
        "score": last[result["main_metric"]],
        "loss": last["loss"],
        "first_training_loss": statistics.mean(losses[:WINDOW]),
    }


def compared(found: Mapping[str, list[dict[str, float]]]) -> dict[str, Any]:
    """The figures of each start by seed, and what is gained over a start from nothing, seed by seed."""
    figures: dict[str, Any] = {}
    for start, runs in found.items():
        figures[start] = {key: [run[key] for run in runs] for key in runs[0]}
        if start != NOTHING:
            gains = {
                key: [run[key] - other[key] for run, other in zip(runs, found[NOTHING], strict=True)]
                for key in runs[0]
            }
            figures[start]["minus_nothing"] = {
                key: {"mean": statistics.mean(each), "std": statistics.stdev(each), "by_seed": each}
                for key, each in gains.items()
            }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with glue and superglue")
    parser.add_argument("--runs", type=Path, default=Path("build/transfer"), help="folder of the runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--prompt-tokens", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--rows", type=int, default=400, help="of the validation split, at most")
    parser.add_argument("--out", type=Path, default=HERE / "transfer.json")
    options = parser.parse_args()

    left_out = ("data", "runs", "out")
    report: dict[str, Any] = {
        "machine": machine(),
        "settings": {key: value for key, value in vars(options).items() if key not in left_out},
        "tasks": {},
    }
    world = init_world(config.load("sst2").engine)
    for task in TASKS:
        train_source(task, options, world)
    lines = []
    for task, sizes in TASKS.items():
        found = train_target(task, options, world)
        majority = json.loads((source_run(options.runs, task, METHODS[0]) / "result.json").read_text())
        report["tasks"][task] = {
            "metric": majority["main_metric"],
            "majority": majority["majority_baseline"][majority["main_metric"]],
            "steps": sizes.steps,
            "source_steps": sizes.source_steps,
            "methods": found,
        }
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        for method, starts in found.items():
            for start, each in starts.items():
                gain = each.get("minus_nothing", {}).get("score", {})
                mean = statistics.mean(each["score"])
                lines.append(
                    [
                        task,
                        method,
                        start,
                        mean,
                        statistics.mean(each["loss"]),
                        gain.get("mean"),
                        gain.get("std"),
                    ]
                )
    world.leave()
    columns = ["task", "method", "from", "score", "loss", "gain", "std of gains"]
    print(tabulate(lines, columns, floatfmt=".3f", missingval="-"))


if __name__ == "__main__":
    main()
