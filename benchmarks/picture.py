"""The picture of the README: what was measured, from the JSON files that benchmarks and studies left.

    python benchmarks/picture.py [--report docs/studies/minilm-sst2-cb/report.json --task sst2]

Three panels: a training step beside PEFT's on one GPU, a search in one running encoder beside its trials one after the
other, and the methods of a study on one task, with the standard deviation over seeds. `picture.png` beside this script.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

HERE = Path(__file__).parent
OURS, THEIRS = "#0072b2", "#8c8c8c"
METHODS = {
    "linear-probe": "linear probe",
    "prompt-tuning": "prompt tuning",
    "gpc-recurrent": "GPC",
    "fine-tuning": "fine-tuning",
}
TASKS = {"sst2": "SST-2", "cb": "CB", "cola": "CoLA"}
STEPS = {"peft": "PEFT", "peft-deepspeed-3": "PEFT + ZeRO-3", "ours-gpc": "GPC-Dist"}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def bars(axes: Axes, figures: dict[str, float], ours: str, shown: str) -> None:
    """Bars that are read from the left, with their figures."""
    names = list(figures)
    colours = [OURS if name == ours else THEIRS for name in names]
    drawn = axes.barh(names, list(figures.values()), color=colours, height=0.6)
    axes.bar_label(drawn, [shown.format(value) for value in figures.values()], padding=4, fontsize=9)
    axes.set_xlim(0, 1.25 * max(figures.values()))
    axes.set_xticks([])
    axes.invert_yaxis()


def draw(report: dict[str, Any], task: str) -> Figure:
    figure = Figure(figsize=(11, 2.7), layout=ConstrainedLayoutEngine(w_pad=0.15))
    speed, search, methods = figure.subplots(1, 3, width_ratios=[1, 1, 1.1])

    fixed = next(each for each in read(HERE / "gpu_t5.json")["results"] if each["lengths"] == "fixed")
    tokens = {name: fixed["sides"][side][0]["tokens_per_s"] for side, name in STEPS.items()}
    bars(speed, tokens, "GPC-Dist", "{:,.0f}")
    speed.set_title("Tokens/s, T5-XL shape on one H100", fontsize=10)

    packed = next(each for each in read(HERE / "packed_search.json")["results"] if each["batch_size"] == 2)
    sides = {"one after the other": "one by one", "two at a time": "two at a time", "packed": "one encoder"}
    seconds = {name: packed["sides"][side]["wall_s"] for side, name in sides.items()}
    bars(search, seconds, "one encoder", "{:.0f} s")
    search.set_title("Eight trials on two CPU cores", fontsize=10)

    held = report["tasks"][task]
    for place, (method, name) in enumerate(METHODS.items()):
        found = held["methods"][method]
        colour = OURS if name == "GPC" else THEIRS
        methods.errorbar(found["mean"], place, xerr=found["std"], fmt="o", color=colour, capsize=3)
        methods.text(found["mean"], place - 0.22, f"{found['mean']:.3f}", ha="center", fontsize=9)
    methods.set_yticks(range(len(METHODS)), list(METHODS.values()))
    methods.set_ylim(len(METHODS) - 0.4, -0.8)
    methods.margins(x=0.12)
    methods.grid(axis="x", alpha=0.3)
    methods.tick_params(axis="x", labelsize=8)
    methods.set_title(f"{TASKS.get(task, task)}, {held['metric']}, MiniLM", fontsize=10)

    for axes in (speed, search, methods):
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(left=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report = HERE.parent / "docs" / "studies" / "minilm-sst2-cb" / "report.json"
    parser.add_argument("--report", type=Path, default=report, help="of a study")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--out", type=Path, default=HERE / "picture.png")
    options = parser.parse_args()
    draw(read(options.report), options.task).savefig(options.out, dpi=150, facecolor="white")


if __name__ == "__main__":
    main()
