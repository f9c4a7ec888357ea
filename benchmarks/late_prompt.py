"""Late prompts over cached text states against PEFT prompt tuning + DeepSpeed.

Prompt tuning on both sides, the same frozen encoder, examples and examples per step, 2 CPU ranks with one thread each;
one side after the other in one go. Our side runs with the prompt before layers 0, L/4, L/2 and 3L/4, each with an
empty cache, over `--epochs` epochs; what filling it took counts.

    python benchmarks/late_prompt.py --data SuperGLUE                         # MiniLM on RTE and BoolQ
    python benchmarks/late_prompt.py --shapes t5-v1_1-base --out shape.json   # random weights, SuperGLUE's lengths
    python benchmarks/late_prompt.py --memory t5-v1_1-large --out memory.json # peak memory with a bf16 checkpoint

With `--data` it also measures a linear probe, which with cached states reads no encoder after the first epoch. The
tables are printed; the JSON file keeps the figures with the machine's description, a plot stands beside it. On a shape
the steps of one epoch are measured and counted `--epochs` times; on a task all of them are run.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import peer_peft
from common import machine
from sides import Setting, prebuild_peer, run_ours, run_peer, write_encoder, write_tokenizer
from tabulate import tabulate

HERE = Path(__file__).parent
SHARES = (0, 0.25, 0.5, 0.75)
"""Of the layers, before which the prompt enters."""


def on_task(task: str, stage: int, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Both sides on real examples, trained as users start them."""
    settings, data = _task(task, "prompt-tuning", options, scratch)
    peer = peer_peft.run_peer(task, stage, settings, data, scratch / f"peer-{task}-{stage}")
    found: dict[str, Any] = {"peer": _figures(peer, peer["samples_per_s"])}
    for share in SHARES:
        ours = _ours(task, stage, settings, data, scratch, {"adapter.first_layer": share})
        found[str(share)] = _figures(ours, ours["samples_per_s_with_state_cache"])
    return found


def probe(task: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Examples per second of a linear probe whose pooled states are computed in each pass, and read from a cache."""
    settings, data = _task(task, "linear-probe", options, scratch)
    found = {}
    for side in ("none", "auto"):
        ours = _ours(task, 0, settings, data, scratch, {"engine.state_cache": side})
        found[side] = _figures(ours, ours["samples_per_s_with_state_cache"])
    steps = [side["examples_per_s_of_steps"] for side in found.values()]
    return {"task": task, "sides": found, "later_epoch_pct": 100 * steps[0] / steps[1]}


def _task(
    task: str, method: str, options: argparse.Namespace, scratch: Path
) -> tuple[argparse.Namespace, Path]:
    """Settings of both sides, and the folder with the rows of an epoch."""
    settings = argparse.Namespace(
        data=options.data, steps=options.steps, batch_size=options.batch_size, max_length=256,
        prompt_tokens=options.prompt_tokens, method=method,
    )  # fmt: skip
    data = scratch / task
    if not data.exists():
        peer_peft.sample(settings, task, scratch)
    settings.steps = options.steps * options.epochs
    return settings, data


def _ours(
    task: str, stage: int, settings: argparse.Namespace, data: Path, scratch: Path, keys: dict[str, Any]
) -> dict[str, Any]:
    """`gpc-dist train` with an empty cache."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    os.environ["GPC_DIST_CACHE"] = str(folder / "cache")
    return peer_peft.run_ours(task, stage, settings, data, folder / "run", keys)


def on_shape(shape: str, stage: int, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Both sides on random weights and synthetic examples of SuperGLUE's lengths."""
    setting, encoder = _shape(shape, "float32", options, scratch)
    peer = run_peer(setting, encoder, stage, recompute=False)
    found = {"peer": _figures(peer, peer["examples_per_s"])}
    for share in SHARES:
        keys = {"adapter.method": "prompt-tuning", "adapter.first_layer": share, "engine.zero_stage": stage}
        ours = run_ours(setting, keys, encoder)
        examples = setting.steps * setting.batch_size * options.epochs
        seconds = examples / ours["examples_per_s"] + ours["state_cache_s"]
        found[str(share)] = _figures(ours, examples / seconds)
    return found


def memory(shape: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Peak memory of a rank at stage 0 with a bf16 checkpoint, its rows as long as they may be, filling included."""
    setting, encoder = _shape(shape, "bfloat16", options, scratch)
    setting = replace(setting, lengths="fixed", ranks=1)
    peaks = {}
    for share in (0, 0.5):
        keys = {"adapter.method": "prompt-tuning", "adapter.first_layer": share, "engine.dtype": "bf16"}
        peaks[str(share)] = max(run_ours(setting, keys, encoder)["peak_memory_mib"])
    return {"shape": shape, "peak_memory_mib": peaks, "of_k_0": {k: v / peaks["0"] for k, v in peaks.items()}}


def _shape(shape: str, dtype: str, options: argparse.Namespace, scratch: Path) -> tuple[Setting, Path]:
    """What both sides run, and the encoder's folder."""
    encoder = scratch / f"{shape}-{dtype}"
    if not encoder.exists():
        write_encoder(shape, dtype, encoder)
        write_tokenizer(encoder)
    setting = Setting(
        shape=shape, device="cpu", lengths="mix", max_length=256, batch_size=options.shape_batch_size,
        prompt_tokens=options.prompt_tokens, steps=options.shape_steps, ranks=peer_peft.RANKS,
    )  # fmt: skip
    return setting, encoder


def _figures(found: dict[str, Any], examples_per_s: float) -> dict[str, Any]:
    return {
        "examples_per_s": examples_per_s,
        "examples_per_s_of_steps": found.get("samples_per_s", found.get("examples_per_s")),
        "state_cache_s": found.get("state_cache_s", 0.0),
        "state_cache_mib": found.get("state_cache_mib", 0.0),
        "peak_memory_mib": found["peak_memory_mib"],
    }


def table(runs: list[dict[str, Any]]) -> str:
    rows = []
    for run in runs:
        peer = run["sides"]["peer"]["examples_per_s"]
        for side, found in run["sides"].items():
            rows.append(
                [run["what"], run["stage"], "PEFT + DeepSpeed" if side == "peer" else f"k = {side} L"]
                + [found["examples_per_s"], found["examples_per_s"] / peer, found["examples_per_s_of_steps"]]
                + [found["state_cache_s"], found["state_cache_mib"], max(found["peak_memory_mib"])]
            )
    headers = [
        "encoder",
        "stage",
        "side",
        "examples/s",
        "ratio",
        "of steps",
        "filling s",
        "cache MiB",
        "peak MiB",
    ]
    return tabulate(rows, headers=headers, floatfmt=".2f")


def plot(runs: list[dict[str, Any]], file: Path) -> None:
    """Examples per second of our side as a multiple of the peer's, by the layer before which the prompt enters."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for run in runs:
        peer = run["sides"]["peer"]["examples_per_s"]
        ratios = [run["sides"][str(share)]["examples_per_s"] / peer for share in SHARES]
        axes.plot(SHARES, ratios, "o-", label=f"{run['what']}, ZeRO stage {run['stage']}")
    axes.axhline(1, color="grey", linewidth=1, linestyle="--")
    axes.set(
        xlabel="layer before which the prompt enters, as a share of all",
        ylabel="times as many examples/s as PEFT + DeepSpeed",
        xticks=SHARES,
        ylim=(0, None),
    )
    axes.legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with SuperGLUE's RTE and BoolQ folders")
    parser.add_argument("--tasks", nargs="+", default=["rte", "boolq"])
    parser.add_argument("--shapes", nargs="+", default=[])
    parser.add_argument("--memory", nargs="+", default=[], help="shapes")
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 3], choices=range(4))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of an epoch, on a task")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--shape-steps", type=int, default=8, help="of an epoch, on a shape")
    parser.add_argument("--shape-batch-size", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=20)
    parser.add_argument("--out", type=Path, default=HERE / "late_prompt.json")
    options = parser.parse_args()

    left_out = ("data", "out")
    settings = {key: value for key, value in vars(options).items() if key not in left_out}
    report: dict[str, Any] = {
        "machine": machine(), "settings": settings, "runs": [], "probe": [], "memory": [],
    }  # fmt: skip

    def keep(kind: str, found: dict[str, Any]) -> None:
        report[kind].append(found)
        options.out.write_text(json.dumps(report, indent=2) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for shape in options.memory:
            keep("memory", memory(shape, options, scratch))
        if options.data or options.shapes:
            prebuild_peer()
        for measure, names in ((on_task, options.tasks if options.data else []), (on_shape, options.shapes)):
            for name in names:
                for stage in options.stages:
                    what = f"MiniLM, {name}" if measure is on_task else name
                    sides = measure(name, stage, options, scratch)
                    keep("runs", {"what": what, "stage": stage, "sides": sides})
        if options.data:
            keep("probe", probe(options.tasks[0], options, scratch))
    for found in report["memory"]:
        rows = [
            (f"k = {share} L", peak, found["of_k_0"][share])
            for share, peak in found["peak_memory_mib"].items()
        ]
        print(tabulate(rows, headers=[found["shape"], "peak MiB", "of k = 0"], floatfmt=".2f"))
    for found in report["probe"]:
        print(
            f"linear probe, {found['task']}: a later epoch takes {found['later_epoch_pct']:.1f} % of one without"
        )
    if report["runs"]:
        print(table(report["runs"]))
        plot(report["runs"], options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
