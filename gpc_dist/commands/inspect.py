"""`gpc-dist inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gpc_dist.commands.command import ENGINE_OF_RUN, Command, count
from gpc_dist.inference import engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", metavar="ADAPTER", nargs="+", type=Path, help="adapter folders of runs")
    parser.add_argument(
        "--examples",
        metavar="N",
        type=count,
        default=64,
        help="the first so many of the validation split [64]",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw them")


def run(options: Any, settings: dict[str, str], words: list[str]) -> int:
    if (code := engine.run_as_ranks(options.adapters[0], settings, words)) is not None:
        return code
    from gpc_dist.reports.inspection import run_inspection

    return run_inspection(options.adapters, options.examples, options.json, options.png, settings)


COMMAND = Command(
    "Show what becomes of a trained prompt from layer to layer.",
    add_arguments,
    run,
    "On some validation examples: how like its start the prompt still is, how much the cell changes it, how large\n"
    "it is beside the text, and how much of the loss's gradient reaches it.\n\n"
    f"{ENGINE_OF_RUN}\n\n"
    "example: gpc-dist inspect runs/rte/adapter --data.path SuperGLUE/RTE --png rte.png",
    settings="recipe",
    on_ranks=True,
)
