r"""LoRA by PEFT on the tasks of a study: the outside reference for its scores.

Model, training loop and adapter are PEFT's and PyTorch's own; of the program come only the rows, their split into what
is trained on, held out and reported, and the metrics. As in the study, the rate and the checkpoint are chosen on the
held-out rows with one seed, and the chosen rate is run with other seeds, each measured once on the official validation
split. Steps, batch size and text length are those of the study's runs.

    python benchmarks/lora.py minilm --data-root DATA
    python benchmarks/lora.py minilm --data-root DATA --tasks cb --rank 4

A run that is in the file already is not run again. Needs `peft`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine
from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tabulate import tabulate
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from gpc_dist import config
from gpc_dist.config import Config
from gpc_dist.encoder.frozen import encoder_path
from gpc_dist.study import spec as study
from gpc_dist.study.spec import StudySpec
from gpc_dist.tasks import Example, Task, make_task, read_part

HERE = Path(__file__).parent
RATES = (5e-4, 2e-3)
WARMUP = 0.06
EVALUATED_ROWS = 64


@dataclass(frozen=True)
class Data:
    """A task's rows and their tokens."""

    task: Task
    parts: dict[str, list[Example]]
    tokens: dict[str, Any]
    pad: Any
    """Makes a batch of some rows' tokens."""


def read(settings: Config) -> Data:
    task = make_task(settings.task, settings.data)
    if task.kind != "classification":
        raise SystemExit(f"{task.name} is no classification: give --tasks without it")
    tokenizer = AutoTokenizer.from_pretrained(encoder_path(settings.encoder))
    parts = {part: read_part(task, settings.data, part) for part in ("train", "holdout", "validation")}
    tokens = {
        part: [
            tokenizer(*filter(None, example.rows[0]), truncation=True, max_length=settings.data.max_length)
            for example in examples
        ]
        for part, examples in parts.items()
    }

    def pad(part: str, indices: Sequence[int]) -> Any:
        return tokenizer.pad([tokens[part][n] for n in indices], return_tensors="pt")

    return Data(task, parts, tokens, pad)


def train(data: Data, settings: Config, rank: int, rate: float, seed: int) -> dict[str, Any]:
    """One run; its scores on both parts are those of the checkpoint that is best on the held-out rows."""
    torch.manual_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(
        encoder_path(settings.encoder), num_labels=data.task.outputs
    )
    lora = LoraConfig(TaskType.SEQ_CLS, r=rank, lora_alpha=2 * rank, target_modules=["query", "value"])
    model = get_peft_model(base, lora)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate)
    steps, every = settings.train.steps, settings.train.eval_every
    assert steps is not None
    assert every is not None
    schedule = get_linear_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    targets = torch.tensor([example.target for example in data.parts["train"]])
    best: tuple[float, int, Any] = (-np.inf, 0, None)
    began_s = time.process_time()
    for step, indices in enumerate(batches(len(targets), settings.train.batch_size, seed, steps), start=1):
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.engine.dtype == "bf16"):
            logits = model(**data.pad("train", indices)).logits
        torch.nn.functional.cross_entropy(logits.float(), targets[indices]).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % every == 0 or step == steps:
            score = measure(model, data, "holdout", settings)
            if score > best[0]:
                best = (score, step, copy.deepcopy(get_peft_model_state_dict(model)))
    set_peft_model_state_dict(model, best[2])
    return {
        "holdout": best[0],
        "best_step": best[1],
        "score": measure(model, data, "validation", settings),
        "cpu_s": round(time.process_time() - began_s, 1),
        "trained": sum(each.numel() for each in trained),
    }


def batches(examples: int, size: int, seed: int, steps: int) -> Iterator[np.ndarray]:
    """Indices of each step: every example once an epoch."""
    draws, order = np.random.default_rng(seed), np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(order) < size:
            order = np.concatenate([order, draws.permutation(examples)])
        yield order[:size]
        order = order[size:]


@torch.no_grad()
def measure(model: torch.nn.Module, data: Data, part: str, settings: Config) -> float:
    """The task's main metric."""
    model.eval()
    order = sorted(range(len(data.parts[part])), key=lambda n: len(data.tokens[part][n]["input_ids"]))
    outputs: list[np.ndarray] = [np.empty(0)] * len(order)
    for start in range(0, len(order), EVALUATED_ROWS):
        indices = order[start : start + EVALUATED_ROWS]
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.engine.dtype == "bf16"):
            logits = model(**data.pad(part, indices)).logits.float().numpy()
        for n, each in zip(indices, logits, strict=True):
            outputs[n] = each
    return data.task.score(data.parts[part], outputs)[data.task.main_metric]


def run(spec: StudySpec, task: str, rank: int, found: dict[str, Any], keep: Callable[[], None]) -> None:
    """Complete a task's result in `found`; every run that ends is kept."""
    settings = config.load(
        spec.recipe_of(task),
        {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in spec.settings_of(task, spec.reference).items()
        },
    )
    data = read(settings)
    searched, runs = found.setdefault("searched", {}), found.setdefault("runs", {})
    for rate in RATES:
        if str(rate) not in searched:
            searched[str(rate)] = statistics.mean(
                train(data, settings, rank, rate, seed)["holdout"] for seed in spec.search_seeds
            )
            keep()
    found |= {"metric": data.task.main_metric, "rate": float(max(searched, key=searched.__getitem__))}
    for seed in map(str, spec.seeds):
        if seed not in runs:
            runs[seed] = train(data, settings, rank, found["rate"], int(seed))
            keep()
    scores = [each["score"] for each in runs.values()]
    found |= {
        "mean": statistics.mean(scores),
        "std": statistics.stdev(scores),
        "trained": runs[str(spec.seeds[0])]["trained"],
    }
    keep()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", help="packaged name or file")
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", help="of the study; all when not given")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--out", type=Path, default=HERE / "lora.json")
    options = parser.parse_args()

    spec = study.load(options.study, {"data_root": str(options.data_root)})
    report: dict[str, Any] = {"study": spec.name, "rank": options.rank, "machine": machine(), "tasks": {}}
    if options.out.exists():
        found = json.loads(options.out.read_text())
        if (found["study"], found["rank"]) == (spec.name, options.rank):
            report = found

    def keep() -> None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")

    for task in options.tasks or spec.tasks:
        run(spec, task, options.rank, report["tasks"].setdefault(task, {}), keep)
    rows = [
        [name, each["metric"], each["mean"], each["std"], each["trained"]]
        for name, each in report["tasks"].items()
        if "mean" in each
    ]
    print(tabulate(rows, headers=["task", "metric", "mean", "std", "trained"], floatfmt=".4f"))


if __name__ == "__main__":
    main()
