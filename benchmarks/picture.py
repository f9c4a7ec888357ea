"""The picture of the README: what was measured, from the JSON files that benchmarks and studies left.

    python benchmarks/picture.py [--report docs/studies/five-tasks/report.json]

Three panels: a training step beside PEFT's on one GPU, a search in one running encoder beside its trials one after the
other, and GPC minus prompt tuning on the tasks of a study. `picture.png` beside this script.
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
TASKS = {"wic": "WiC", "cb": "CB", "sst2": "SST-2", "cola": "CoLA", "rte": "RTE"}
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


def intervals(axes: Axes, differences: dict[str, dict[str, Any]], ours: str) -> None:
    """Differences in points, from the top down, with their intervals."""
    for place, (name, found) in enumerate(differences.items()):
        middle, low, high = (100 * value for value in (found["mean"], *found["interval"]))
        colour = OURS if name == ours else THEIRS
        axes.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color=colour, capsize=3)
        axes.text(middle, place - 0.22, f"{middle:+.1f}", ha="center", fontsize=9)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.spines["left"].set_visible(False)
    axes.set_yticks(range(len(differences)), list(differences))
    axes.set_ylim(len(differences) - 0.4, -0.8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)


def draw(report: dict[str, Any]) -> Figure:
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

    held = {
        TASKS[name]: task["methods"]["gpc"]["difference"]
        for name, task in report["tasks"].items()
        if task["learnt"]
    }
    intervals(methods, held | {"mean": report["means"]["gpc"]["difference"]}, "mean")
    methods.set_title("GPC minus prompt tuning, points, MiniLM", fontsize=10)

    for axes in (speed, search, methods):
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(left=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report = HERE.parent / "docs" / "studies" / "five-tasks" / "report.json"
    parser.add_argument("--report", type=Path, default=report, help="of a study")
    parser.add_argument("--out", type=Path, default=HERE / "picture.png")
    options = parser.parse_args()
    draw(read(options.report)).savefig(options.out, dpi=150, facecolor="white")


if __name__ == "__main__":
    main()
