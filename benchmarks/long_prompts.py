r"""Ten seeds of a prompt of 100 tokens on SST-2: which of them learn.

For each arm, all seeds train at once in the lanes of one frozen MiniLM, one arm after the other. Beside the cells as
they start now there is the recurrent one as it started before, with both units drawn at random.

    python benchmarks/long_prompts.py --data GLUE/sst2
    python benchmarks/long_prompts.py --data GLUE/sst2 --arms linear-probe recurrent recurrent-rank-64 residual-rank-64
    python benchmarks/long_prompts.py --data GLUE/sst2 --steps 300 --cut 20 --batch-size 4 --rows 8 \
        --arms recurrent-random-start recurrent --out benchmarks/long_prompts_first_steps.json

The second made `long_prompts.json`, and the third the file that it names, one arm at a time: cut off after 20 steps, an
accuracy says nothing, and what counts is how much of what the head reads depends on the text (`spread`).

A run has failed if its accuracy is within 2 points of the majority's, or more than 5 below a linear probe's. Nothing is
chosen on the rows that are scored: what is measured is the last step. The file is written after each arm, and an arm
that it has of the same settings is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import machine
from tabulate import tabulate
from torch import Tensor, nn

from gpc_dist import config
from gpc_dist.adapter.cell import CELLS, RecurrentCell
from gpc_dist.adapter.graft import GraftedEncoder
from gpc_dist.config import AdapterConfig, EncoderConfig
from gpc_dist.distributed.world import World, init_world
from gpc_dist.encoder.frozen import encoder_path
from gpc_dist.runs.folder import RunFolder
from gpc_dist.training.pack import Pack

HERE = Path(__file__).parent
WINDOW = 10
TEXTS = 32
"""Validation rows of which `spread` is measured."""
ARMS: dict[str, dict[str, str]] = {
    "linear-probe": {"adapter.method": "linear-probe"},
    "recurrent-random-start": {"adapter.cell": "recurrent"},
    "recurrent": {"adapter.cell": "recurrent"},
    "recurrent-rank-64": {"adapter.cell": "recurrent", "adapter.cell_rank": "64"},
    "residual": {"adapter.cell": "residual"},
    "residual-rank-64": {"adapter.cell": "residual", "adapter.cell_rank": "64"},
    "gated": {"adapter.cell": "gated"},
    "prompt-tuning": {"adapter.method": "prompt-tuning"},
}


class RandomStart(RecurrentCell):
    """The recurrent cell as it started before: `nn.Linear`'s own draws in both units."""

    def __init__(self, hidden_size: int, config: AdapterConfig):
        super().__init__(hidden_size, config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()


@contextmanager
def _start_of(arm: str) -> Iterator[None]:
    if arm == "recurrent-random-start":
        with patch.dict(CELLS, {"recurrent": RandomStart}):
            yield
    else:
        yield


def train(arm: str, options: argparse.Namespace, world: World, scratch: Path) -> dict[int, RunFolder]:
    """Train all seeds of an arm together; returns their folders."""
    settings = {
        "data.path": str(options.data),
        "data.max_length": "48",
        "data.limit_train": "2000",
        "data.limit_eval": str(options.rows),
        "adapter.prompt_tokens": str(options.prompt_tokens),
        "train.steps": str(options.steps),
        "train.batch_size": str(options.batch_size),
        "train.lr": str(options.lr),
        "train.eval_every": str(options.cut or options.steps),
        "train.eval_batch_tokens": "4096",
        "train.log_every": "1",
        "engine.dtype": "bf16",
        "engine.state_cache": "none",
        **ARMS[arm],
    }
    folders = {seed: scratch / arm / str(seed) for seed in options.seeds}
    configs = {
        str(seed): config.load("sst2", settings | {"run.seed": str(seed), "run.dir": str(folder)})
        for seed, folder in folders.items()
    }
    with _start_of(arm):
        pack = Pack(next(iter(configs.values())), world)
        for name, each in configs.items():
            pack.add(name, each, ["benchmarks/long_prompts.py"])
        while pack.names:
            for event in pack.advance(pack.names):
                if event.metrics:
                    pack.leave(event.name)
    return {seed: RunFolder(folder) for seed, folder in folders.items()}


def figures(folders: Mapping[int, RunFolder], texts: list[str]) -> dict[str, Any]:
    """Accuracy and loss on the validation rows after the last step, by seed, as a study's report has them; and of each
    `WINDOW` steps of training the mean loss and the median gradient norm."""
    results = {seed: json.loads(folder.result.read_text()) for seed, folder in folders.items()}
    last = {seed: result["metrics"]["last"] for seed, result in results.items()}
    scores = {seed: found["accuracy"] for seed, found in last.items()}
    return {
        "mean": statistics.mean(scores.values()),
        "std": statistics.stdev(scores.values()) if len(scores) > 1 else None,
        "scores": scores,
        "losses": {seed: found["loss"] for seed, found in last.items()},
        "spread": {seed: spread(folder, texts) for seed, folder in folders.items()},
        "training": {seed: curve(folder) for seed, folder in folders.items()},
        "majority": next(iter(results.values()))["majority_baseline"]["accuracy"],
        "trainable_parameters": next(iter(results.values()))["trainable_parameters"],
    }


def spread(folder: RunFolder, texts: list[str]) -> float:
    """How much of what the head reads depends on the text: the root mean square of its deviation from the texts' mean,
    divided by its own. A run in which it is near 0 cannot learn."""
    from transformers import AutoModel, AutoTokenizer

    files = encoder_path(EncoderConfig())
    graft = GraftedEncoder.from_pretrained(folder.adapter, AutoModel.from_pretrained(files))
    read: list[Tensor] = []
    graft.adapter.head.register_forward_pre_hook(lambda _, given: read.extend(given[0]))
    batch = AutoTokenizer.from_pretrained(files)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        graft(batch["input_ids"], batch["attention_mask"])
    (states,) = read
    return round(((states - states.mean(0)).square().mean() / states.square().mean()).sqrt().item(), 3)


def curve(folder: RunFolder) -> dict[str, list[float]]:
    """Mean loss and median gradient norm of each `WINDOW` steps."""
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    found = {}
    for name, middle in (("loss", statistics.mean), ("grad_norm", statistics.median)):
        values = [line[f"train/{name}"] for line in lines if f"train/{name}" in line]
        found[name] = [round(middle(values[at : at + WINDOW]), 4) for at in range(0, len(values), WINDOW)]
    return found


def failed(found: Mapping[str, Any], probe: Mapping[str, Any] | None) -> list[int]:
    """The seeds of an arm that have failed."""
    least = found["majority"] + 0.02
    if probe is not None:
        least = max(least, probe["mean"] - 0.05)
    return [seed for seed, score in found["scores"].items() if score < least]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="SST-2's folder")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(1, 11)))
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--cut", type=int, help="end after so many of the steps, at the rates of a whole run")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--rows", type=int, default=872, help="of the validation split")
    parser.add_argument("--out", type=Path, default=HERE / "long_prompts.json")
    options = parser.parse_args()

    left_out = ("data", "out", "arms")
    report: dict[str, Any] = {
        "machine": machine(),
        "settings": {key: value for key, value in vars(options).items() if key not in left_out},
        "methods": {},
    }
    if options.out.exists():
        found = json.loads(options.out.read_text())
        if found["settings"] == json.loads(json.dumps(report["settings"])):
            report = found
    with (options.data / "val.jsonl").open() as lines:
        texts = [json.loads(line)["sentence"] for line in islice(lines, TEXTS)]
    world = init_world(config.load("sst2").engine)
    with tempfile.TemporaryDirectory() as folder:
        for arm in [each for each in options.arms if each not in report["methods"]]:
            report["methods"][arm] = figures(train(arm, options, world, Path(folder)), texts)
            for found in report["methods"].values() if not options.cut else ():
                found["failed"] = failed(found, report["methods"].get("linear-probe"))
            options.out.write_text(json.dumps(report, indent=2) + "\n")
    world.leave()
    rows = [
        [
            arm,
            found["mean"],
            min(found["scores"].values()),
            min(found["spread"].values()),
            found.get("failed"),
        ]
        for arm, found in report["methods"].items()
    ]
    print(tabulate(rows, headers=["arm", "accuracy", "lowest", "lowest spread", "failed"], floatfmt=".3f"))


if __name__ == "__main__":
    main()
