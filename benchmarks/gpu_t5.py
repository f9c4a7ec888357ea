"""GPC-Dist against PEFT prompt tuning on a T5-shaped encoder with random weights: tokens/s, MFU, peak memory.

    python benchmarks/gpu_t5.py                           T5-XL on one GPU, every side, both kinds of lengths
    python benchmarks/gpu_t5.py --shape t5-v1_1-xxl --sides ours-gpc
    python benchmarks/gpu_t5.py --cpu                     the same code at a size that a CPU runs in a minute

Sides: ours (GPC with rank-64 cells, and prompt tuning, each with and without torch.compile), PEFT in plain PyTorch,
and PEFT under DeepSpeed at stages 2 and 3 (see peer_t5.py). Each runs in a process of its own on the same examples,
every one once in the measured steps; a second turn runs them in the opposite order. Lengths are fixed (every row
`--max-length` tokens) or a mix of SuperGLUE's tasks. A side that does not fit is run again with activation
checkpointing. Tokens are text without padding. MFU is of the datasheet's peak where it is known, else of the
measured one. The table is printed; a JSON file beside this script keeps all figures with the machine's description.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import machine
from sides import Setting, SideError, missing_packages, run_ours, run_peer, write_encoder
from tabulate import tabulate

GPC = {"adapter.method": "gpc", "adapter.cell_rank": 64}
PROMPT_TUNING = {"adapter.method": "prompt-tuning"}
COMPILED = {"engine.compile": True}
OURS: dict[str, dict[str, Any]] = {
    "ours-gpc": GPC,
    "ours-prompt-tuning": PROMPT_TUNING,
    "ours-gpc-compiled": GPC | COMPILED,
    "ours-prompt-tuning-compiled": PROMPT_TUNING | COMPILED,
}
PEERS: dict[str, int | None] = {"peft": None, "peft-deepspeed-2": 2, "peft-deepspeed-3": 3}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", help="[t5-v1_1-xl; t5-v1_1-small with --cpu]")
    parser.add_argument("--sides", nargs="+", choices=[*OURS, *PEERS], help="[all; none compiled with --cpu]")
    parser.add_argument("--lengths", nargs="+", default=["fixed", "mix"], help="[fixed mix]")
    parser.add_argument("--batch-size", type=int, help="examples per step [32; 4 with --cpu]")
    parser.add_argument("--max-length", type=int, help="text tokens [512; 32 with --cpu]")
    parser.add_argument("--prompt-tokens", type=int, default=20)
    parser.add_argument("--steps", type=int, help="measured steps [20; 2 with --cpu]")
    parser.add_argument("--repeats", type=int, default=1, help="turns of all sides")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, help="[gpu_t5.json or gpu_t5_cpu.json beside this script]")
    options = parser.parse_args()
    defaults = {
        "shape": ("t5-v1_1-xl", "t5-v1_1-small"),
        "sides": ([*OURS, *PEERS], [name for name in (*OURS, *PEERS) if "compiled" not in name]),
        "batch_size": (32, 4),
        "max_length": (512, 32),
        "steps": (20, 2),
        "out": tuple(Path(__file__).with_name(name) for name in ("gpu_t5.json", "gpu_t5_cpu.json")),
    }
    for name, values in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, values[options.cpu])
    return options


def measure(side: str, setting: Setting, encoder: Path) -> dict[str, Any]:
    """One run of a side, or why there is none (`failed`)."""
    for recompute in (False, True):
        try:
            if side in OURS:
                found = run_ours(setting, OURS[side] | {"engine.activation_checkpointing": recompute})
            else:
                found = run_peer(setting, encoder, PEERS[side], recompute)
            return {"recompute": recompute, **found}
        except SideError as error:
            reason = str(error)
        if "out of memory" not in reason.lower():
            break
    return {"recompute": recompute, "failed": reason}


def brief(reason: str) -> str:
    """The line that names an error, which other words may follow."""
    lines = reason.splitlines()
    return next((line for line in lines if re.search(r"[Ee]rror: \S", line)), lines[-1])[:80]


def compare(
    setting: Setting, repeats: int, sides: list[str], encoder: Path
) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """All runs of all sides at one kind of lengths; what has been found, after each run."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for turn in range(repeats):
        for side in sides if turn % 2 == 0 else reversed(sides):
            found = measure(side, setting, encoder)
            runs[side].append(found)
            said = found.get("failed") or f"{found['tokens_per_s']:,.0f} tokens/s, {found['step_ms']:,.1f} ms"
            print(f"{setting.lengths}: {side}: {said}", flush=True)
            yield runs


def lines(result: dict[str, Any], batch_size: int) -> list[list[Any]]:
    """A line for each side: medians of its runs."""
    medians = {
        side: {key: statistics.median(run[key] for run in runs) for key in ("tokens_per_s", "step_ms")}
        for side, runs in result["sides"].items()
        if not any("failed" in run for run in runs)
    }
    ours = [run for side in OURS for run in result["sides"].get(side, []) if "failed" not in run]
    table = []
    for side, runs in result["sides"].items():
        last = runs[-1]
        if side not in medians:
            table.append([result["lengths"], side, brief(last["failed"])])
            continue
        speed = medians[side]["tokens_per_s"]
        peer = medians.get("peft")
        mfu = None
        if ours:
            peaks = [run["peak_tflops"]["datasheet"] or run["peak_tflops"]["measured"] for run in ours]
            steps_per_s = statistics.median(run["examples_per_s"] for run in runs) / batch_size
            mfu = 100 * steps_per_s * ours[0]["model_tflop_per_step"] / max(peaks)
        table.append(
            [result["lengths"], side, speed, speed / peer["tokens_per_s"] if peer else None]
            + [medians[side]["step_ms"], mfu, last["padding_pct"]]
            + [max(last["peak_memory_mib"]) / 1024, "yes" if last["recompute"] else "no"]
        )
    return table


def main() -> None:
    options = parse_args()
    sides = []
    for side in options.sides:
        missing = missing_packages(PEERS[side]) if side in PEERS else []
        if missing:
            print(f"left out: {side}, because {' and '.join(missing)} is not installed")
        else:
            sides.append(side)
    report: dict[str, Any] = {
        "machine": machine(),
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        "results": [],
    }
    device = "cpu" if options.cpu else "cuda"
    table: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        encoder = Path(scratch) / "encoder"
        if any(side in PEERS for side in sides):
            write_encoder(options.shape, "float32" if options.cpu else "bfloat16", encoder)
        for lengths in options.lengths:
            setting = Setting(
                shape=options.shape,
                device=device,
                lengths=lengths,
                max_length=options.max_length,
                batch_size=options.batch_size,
                prompt_tokens=options.prompt_tokens,
                steps=options.steps,
            )
            result: dict[str, Any] = {"lengths": lengths}
            report["results"].append(result)
            for runs in compare(setting, options.repeats, sides, encoder):
                result["sides"] = runs
                # a GPU that is there for minutes only may go before the last side has run
                options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            table += lines(result, options.batch_size)
    headers = ["lengths", "side", "tokens/s", "ratio to peft", "step ms", "MFU %"]
    headers += ["padding %", "peak GiB", "recompute"]
    print(
        tabulate(table, headers=headers, floatfmt=(*[""] * 2, ",.0f", ".2f", ",.1f", ".1f", ".1f", ".2f", ""))
    )


if __name__ == "__main__":
    main()
