"""What must hold of a search after faults: of each trial by itself, of its rungs, and compared with the reference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from gpc_dist.distributed import checkpoint
from tests.faults.search_kinds import EVERY, STEPS, TRIALS, SearchCase

_SAME = ("train/loss", "train/grad_norm", "train/lr_factor", "train/epoch")


def results(folder: Path) -> dict[str, Any]:
    """What must be equal in two searches."""
    result = json.loads((folder / "result.json").read_text())
    del result["wall_s"]
    trials = [_trial(path) for path in sorted((folder / "trials").iterdir())]
    return {"result": result, "trials": trials}


def _trial(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "trial.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [
        {key: value for key, value in line.items() if key in ("step", *_SAME) or key.startswith("val/")}
        for line in lines
    ]
    newest = checkpoint.newest(folder / "checkpoints")
    if newest is None:
        raise ValueError(f"{folder} has no checkpoint")
    return {
        "number": record["number"],
        "settings": record["settings"],
        "seed": record["seed"],
        "decision": record["decision"],
        "state": json.loads((folder / "status.json").read_text())["state"],
        "best": json.loads((folder / "result.json").read_text())["metrics"]["best"],
        "copied": (folder / "started-from").exists(),
        "metrics": metrics,
        "times": [line["time_s"] for line in lines if "val/accuracy" in line],
        "adapter": (folder / "adapter" / "adapter.safetensors").read_bytes(),
        "weights": (newest / "trained.safetensors").read_bytes(),
        "saved": checkpoint.step_of(newest),
    }


def consistent(case: SearchCase, found: dict[str, Any], alone: dict[str, Any]) -> list[str]:
    """What does not hold of each trial by itself."""
    problems = []
    if len(found["trials"]) != TRIALS:
        return [f"{len(found['trials'])} trials"]
    for mine, reference in zip(found["trials"], alone["trials"], strict=True):
        name = f"trial {mine['number']:03d}"
        steps = [line["step"] for line in mine["metrics"] if "train/loss" in line]
        evaluated = [line["step"] for line in mine["metrics"] if "val/accuracy" in line]
        if mine["copied"]:
            if steps != sorted(set(steps)) or evaluated != sorted(set(evaluated)) or steps[-1] != STEPS:
                problems.append(f"{name} has steps {steps} and evaluations {evaluated}")
            continue
        last = max(steps, default=0)
        if steps != list(range(1, last + 1)) or evaluated != list(range(EVERY, last + 1, EVERY)):
            problems.append(f"{name} has steps {steps} and evaluations {evaluated}")
        elif mine["settings"] != reference["settings"] or mine["seed"] != reference["seed"]:
            problems.append(f"{name} has other settings: {mine['settings']}")
        else:
            problems += _unlike(name, mine["metrics"], reference["metrics"], case.packed)
        stopped = mine["decision"] == "stopped by scheduler" and case.scheduler == "asha" and last in (4, 8)
        if not (stopped or (mine["decision"] == "completed" and last == STEPS)):
            problems.append(f"{name} is {mine['decision']} at step {last}")
        if mine["state"] != ("stopped" if stopped else "finished"):
            problems.append(f"{name} is {mine['decision']}, and its run {mine['state']}")
    return problems + _rungs(case, found) + _best(found)


def _unlike(name: str, mine: list[Any], theirs: list[Any], packed: bool) -> list[str]:
    """What differs in a trial's lines, which may be fewer."""
    for line, reference in zip(mine, theirs, strict=False):
        if packed:
            keys = [key for key in reference if key not in ("train/grad_norm", "val/accuracy")]
            same = line.keys() == reference.keys() and all(
                math.isclose(line[key], reference[key], rel_tol=1e-2, abs_tol=1e-4) for key in keys
            )
        else:
            same = line == reference
        if not same:
            return [f"{name} differs at step {line['step']}: {line} instead of {reference}"]
    return []


def _rungs(case: SearchCase, found: dict[str, Any]) -> list[str]:
    """A trial that was stopped at a rung was not the best of those that came there."""
    if case.scheduler != "asha":
        return []
    values = [
        {line["step"]: line["val/accuracy"] for line in trial["metrics"] if "val/accuracy" in line}
        for trial in found["trials"]
    ]
    problems = []
    for trial, own in zip(found["trials"], values, strict=True):
        rung = max(own)
        if trial["decision"] != "completed" and own[rung] >= max(each.get(rung, 0.0) for each in values):
            problems.append(f"trial {trial['number']:03d} was stopped at step {rung}, where it was the best")
    return problems


def _best(found: dict[str, Any]) -> list[str]:
    values = [
        max(line["val/accuracy"] for line in trial["metrics"] if "val/accuracy" in line)
        for trial in found["trials"]
        if not trial["copied"]
    ]
    result = found["result"]
    ends = [trial["decision"] for trial in found["trials"]]
    counted = {
        "trials": len(ends),
        "finished": ends.count("completed"),
        "stopped": ends.count("stopped by scheduler"),
        "failed": ends.count("failed"),
    }
    problems = [
        f"{key} is {result[key]}, not {count}" for key, count in counted.items() if result[key] != count
    ]
    if values and result["best"] < max(values):
        problems.append(f"the best is {result['best']}, and a trial has {max(values)}")
    return problems


def differences(found: dict[str, Any], same: dict[str, Any], packed: bool) -> list[str]:
    """What differs from the search without a fault, which decides the same."""
    keys = ("decision", "saved") if packed else ("decision", "saved", "metrics", "best", "adapter", "weights")
    problems = [
        f"trial {mine['number']:03d} has another {key}"
        for mine, theirs in zip(found["trials"], same["trials"], strict=True)
        for key in keys
        if mine[key] != theirs[key]
    ]
    if not packed and found["result"] != same["result"]:
        problems.append(f"result {found['result']} instead of {same['result']}")
    return problems
