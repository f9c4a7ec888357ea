"""How a training step grows on CPU ranks, and how it compares with PEFT + DeepSpeed at every ZeRO stage.

    python benchmarks/scaling.py

First GPC-Dist (prompt tuning, the same method as the peer's) against `peer_t5.py` under DeepSpeed, ZeRO stages 0 to
3, with rows of one length and with the lengths of SuperGLUE's tasks. Then GPC with rank-64 cells alone, at stages 0
and 3: one of encoder size (N), text tokens (T), prompt tokens (P) and ranks is varied, the others stay. Encoders are
T5-shaped with random weights; every rank has one thread; a step has `--batch-size` examples over all ranks. Every
measurement is a run of its own. Tables are printed; `scaling.json` and `scaling.png` beside this script keep the
figures and the plot.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from common import machine
from sides import Setting, prebuild_peer, run_ours, run_peer, write_encoder
from tabulate import tabulate

STAGES = (0, 1, 2, 3)
GROWTH_STAGES = (0, 3)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="t5-v1_1-base", help="N where it does not vary")
    parser.add_argument("--max-length", type=int, default=64, help="T where it does not vary")
    parser.add_argument("--prompt-tokens", type=int, default=20, help="P where it does not vary")
    parser.add_argument("--ranks", type=int, default=2, help="where they do not vary")
    parser.add_argument("--batch-size", type=int, default=8, help="examples per step, all ranks")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a run")
    parser.add_argument("--repeats", type=int, default=1, help="turns of both sides")
    parser.add_argument(
        "--shapes", nargs="+", default=[f"t5-v1_1-{size}" for size in ("small", "base", "large")]
    )
    parser.add_argument("--texts", nargs="+", type=int, default=[32, 64, 128, 256])
    parser.add_argument("--prompts", nargs="+", type=int, default=[5, 20, 50, 100])
    parser.add_argument("--rank-counts", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    return parser.parse_args()


def compare_stages(setting: Setting, repeats: int, scratch: Path) -> list[dict[str, Any]]:
    """Both sides at every stage and kind of lengths, in turns."""
    encoder = scratch / "encoder"
    write_encoder(setting.shape, "float32", encoder)
    prebuild_peer()
    found = []
    for lengths in ("fixed", "mix"):
        same = replace(setting, lengths=lengths)
        for stage in STAGES:
            sides: dict[str, Callable[[], dict[str, Any]]] = {
                "peer": lambda same=same, stage=stage: run_peer(same, encoder, stage, recompute=False),
                "ours": lambda same=same, stage=stage: run_ours(
                    same, {"engine.zero_stage": stage, "adapter.method": "prompt-tuning"}
                ),
            }
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            for turn in range(repeats):
                for side in sides if turn % 2 == 0 else reversed(sides):
                    runs[side].append(sides[side]())
                    print(f"{lengths}, stage {stage}: {side} {runs[side][-1]['step_ms']:,.0f} ms", flush=True)
            speed = {side: median(runs[side], "examples_per_s") for side in sides}
            found.append(
                {"lengths": lengths, "stage": stage, "ratio": speed["ours"] / speed["peer"], "runs": runs}
            )
    return found


def median(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


@cache
def run_gpc(setting: Setting, stage: int) -> dict[str, Any]:
    """One run; the point where all the curves meet is run once."""
    found = run_ours(
        setting,
        {"engine.zero_stage": stage, "adapter.method": "gpc", "adapter.cell_rank": 64},
    )
    print(f"{setting}, stage {stage}: {found['step_ms']:,.0f} ms", flush=True)
    return found


def measure_growth(setting: Setting, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Step times over each of N, T, P and ranks."""
    varied: dict[str, list[Setting]] = {
        "N": [replace(setting, shape=shape) for shape in options.shapes],
        "T": [replace(setting, max_length=length) for length in options.texts],
        "P": [replace(setting, prompt_tokens=tokens) for tokens in options.prompts],
        "ranks": [replace(setting, ranks=ranks) for ranks in options.rank_counts],
    }
    found = []
    for name, settings in varied.items():
        for stage in GROWTH_STAGES:
            for point in settings:
                run = run_gpc(point, stage)
                value = {
                    "N": run["frozen_parameters"] / 1e6,
                    "T": point.max_length,
                    "P": point.prompt_tokens,
                    "ranks": point.ranks,
                }[name]
                floor_ms = 1000 * run["model_tflop_per_step"] / run["peak_tflops"]["measured"]
                found.append(
                    {"varied": name, "value": value, "stage": stage, "floor_ms": floor_ms, "run": run}
                )
    return found


def plot(report: dict[str, Any], file: Path) -> None:
    """Both comparisons as bars, the four growth curves below and beside them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    panels = iter(figure.subplots(2, 3).flat)
    for lengths, title in (("fixed", "rows of one length"), ("mix", "SuperGLUE's lengths")):
        panel = next(panels)
        results = [r for r in report["stages"] if r["lengths"] == lengths]
        for place, (side, label) in enumerate((("peer", "PEFT + DeepSpeed"), ("ours", "GPC-Dist"))):
            heights = [median(r["runs"][side], "step_ms") for r in results]
            bars = panel.bar([r["stage"] + 0.4 * place - 0.2 for r in results], heights, 0.38, label=label)
            if side == "ours":
                panel.bar_label(bars, [f"{r['ratio']:.2f}x" for r in results])
        panel.set(title=f"Prompt tuning, {title}", xlabel="ZeRO stage (x: examples/s)", ylabel="step, ms")
        panel.set_xticks([r["stage"] for r in results])
        panel.margins(y=0.3)  # room for the legend
        panel.legend(loc="upper center", ncols=2)
    labels = {
        "N": "N: frozen parameters, millions",
        "T": "T: text tokens",
        "P": "P: prompt tokens",
        "ranks": "ranks",
    }
    for name, label in labels.items():
        panel = next(panels)
        for stage in GROWTH_STAGES:
            points = [p for p in report["growth"] if p["varied"] == name and p["stage"] == stage]
            values = [p["value"] for p in points]
            panel.plot(values, [p["run"]["step_ms"] for p in points], "o-", label=f"ZeRO {stage}")
        panel.plot(values, [p["floor_ms"] for p in points], "k--", label="FLOPs at the measured peak")
        panel.set(title=f"GPC: step over {name}", xlabel=label, ylabel="step, ms", ylim=(0, None))
        panel.set_xticks(values)
        panel.legend()
    shared = report["settings"]
    figure.suptitle(
        f"{shared['shape']}, {shared['batch_size']} examples a step, T {shared['max_length']}, "
        f"P {shared['prompt_tokens']}, {shared['ranks']} ranks of one thread, where not varied"
    )
    figure.savefig(file, dpi=110)


def main() -> None:
    options = parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    report: dict[str, Any] = {
        "machine": machine(),
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
    }
    setting = Setting(
        shape=options.shape,
        device="cpu",
        lengths="fixed",
        max_length=options.max_length,
        batch_size=options.batch_size,
        prompt_tokens=options.prompt_tokens,
        steps=options.steps,
        ranks=options.ranks,
    )
    with tempfile.TemporaryDirectory() as scratch:
        report["stages"] = compare_stages(setting, options.repeats, Path(scratch))
    report["growth"] = measure_growth(setting, options)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    plot(report, options.out.with_suffix(".png"))

    stages = [
        [r["lengths"], r["stage"]]
        + [median(r["runs"][side], "step_ms") for side in ("peer", "ours")]
        + [r["ratio"]]
        + [r["runs"][side][-1]["padding_pct"] for side in ("peer", "ours")]
        + [r["runs"]["ours"][-1]["communication_pct"]]
        for r in report["stages"]
    ]
    headers = [
        "lengths",
        "stage",
        "peer ms",
        "ours ms",
        "examples/s ratio",
        "peer padding %",
        "ours padding %",
    ]
    print(tabulate(stages, headers=[*headers, "communication %"], floatfmt=",.2f"))
    growth = [
        [p["varied"], p["value"], p["stage"], p["run"]["step_ms"], p["floor_ms"]]
        + [p["run"]["communication_pct"], max(p["run"]["peak_memory_mib"])]
        for p in report["growth"]
    ]
    headers = ["varied", "value", "stage", "step ms", "floor ms", "communication %", "peak MiB"]
    print("\n" + tabulate(growth, headers=headers, floatfmt=",.1f"))


if __name__ == "__main__":
    main()
