"""A study of two tasks whose runs share one pack against a study of each, one after the other.

Both tasks are made of the packaged messages: which desk one is for, and whether its last sentence, without the mark at
its end, is a question. Prompt tuning and GPC have three seeds each, so a task has six runs. All are `gpc-dist study` as
a user calls it, with the same ranks, ZeRO stage, steps and data, recorded in MLflow, from the command to its end.

    python benchmarks/packed_tasks.py

Seconds are those of the clock, and of all cores for all processes: on a machine that others use too, the latter are the
ones to compare. Memory is that of `packed_search.py`. `packed_tasks.json` beside this script keeps the figures, with
the scores of every run on both sides and the machine's description.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from common import machine
from packed_search import measure
from tabulate import tabulate

from gpc_dist.shipped import shipped_folder

SEEDS = [1, 2, 3]
METHODS: dict[str, dict[str, Any]] = {"prompt-tuning": {}, "gpc": {}}


def write_questions(folder: Path) -> None:
    """The data of the second task."""
    source = shipped_folder("recipes") / "demo_data"
    for split in ("train", "validation"):
        rows = []
        for line in (source / f"{split}.jsonl").read_text().splitlines():
            last = re.split(r"(?<=[.!?])\s+", json.loads(line)["text"].strip())[-1]
            rows.append({"text": last.rstrip(".!?"), "label": "yes" if last.endswith("?") else "no"})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def study(options: argparse.Namespace, tasks: Sequence[str], data: Path) -> dict[str, Any]:
    """A study of these tasks, with a lane for each run."""
    question = {"task.name": "question", "task.labels": ["no", "yes"], "data.path": str(data)}
    known = {"desk": {"recipe": "demo"}, "question": {"recipe": "demo", "settings": question}}
    return {
        "encoder": {"path": "minilm"},
        "tasks": {task: known[task] for task in tasks},
        "methods": METHODS,
        "seeds": SEEDS,
        "settings": {
            "train.steps": options.steps,
            "train.eval_every": options.steps,
            "train.batch_size": options.batch_size,
            "data.limit_eval": 64,
            "adapter.prompt_tokens": 5,
            "engine.zero_stage": options.stage,
        },
        "resources": {"ranks": options.ranks, "pack": len(tasks) * len(METHODS) * len(SEEDS)},
    }


def side(options: argparse.Namespace, parts: Sequence[Sequence[str]], scratch: Path) -> dict[str, Any]:
    """What a study of each part takes, one after the other, and the scores of all runs."""
    commands: list[Sequence[object]] = []
    (data := scratch / "data").mkdir()
    write_questions(data)
    for tasks in parts:
        name = "-".join(tasks)
        file = scratch / f"{name}.yaml"
        file.write_text(yaml.safe_dump(study(options, tasks, data)))
        commands.append(["study", file, "--dir", scratch / name])
    before = os.times()
    cost = measure(commands, 1, scratch / "log")
    after = os.times()
    spent_s = sum(getattr(after, key) - getattr(before, key) for key in ("children_user", "children_system"))
    return asdict(cost) | {"cpu_s": spent_s, "scores": scores(scratch)}


def scores(scratch: Path) -> dict[str, dict[str, dict[str, float]]]:
    """By task, method and seed."""
    reports = [json.loads(file.read_text()) for file in sorted(scratch.glob("*/report.json"))]
    return {
        task: {method: found["scores"] for method, found in result["methods"].items()}
        for report in reports
        for task, result in sorted(report["tasks"].items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    report: dict[str, Any] = {
        "options": {key: value for key, value in vars(options).items() if key != "json"},
        "machine": machine(),
        "sides": {},
    }
    for name, parts in (("two packs", [["desk"], ["question"]]), ("one pack", [["desk", "question"]])):
        with tempfile.TemporaryDirectory() as scratch:
            report["sides"][name] = side(options, parts, Path(scratch))
    options.json.write_text(json.dumps(report, indent=2) + "\n")
    figures = ("wall_s", "cpu_s", "peak_mib")
    rows = [[name, *(found[figure] for figure in figures)] for name, found in report["sides"].items()]
    print(tabulate(rows, headers=["side", *figures], floatfmt=".0f"))
    one, two = (report["sides"][name]["scores"] for name in ("one pack", "two packs"))
    print("scores are the same" if one == two else json.dumps({"one pack": one, "two packs": two}, indent=2))


if __name__ == "__main__":
    main()
