"""`gpc-dist bench`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gpc_dist import config
from gpc_dist.commands.command import Command, add_recipe, count
from gpc_dist.distributed import launch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--steps", metavar="N", type=count, default=20, help="steps to measure, after a few to warm up [20]"
    )
    parser.add_argument(
        "--lengths",
        metavar="KIND",
        default="mix",
        help="text lengths: fixed (every row data.max_length), mix (as SuperGLUE's tasks), or one of boolq, cb, "
        "multirc, rte, wic, wsc [mix]",
    )
    parser.add_argument("--shape", metavar="NAME", help="random weights in a known shape, such as t5-v1_1-xl")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")


def run(options: Any, settings: dict[str, str], words: list[str]) -> int:
    chosen = config.load(options.recipe, settings)
    if (code := launch.run_as_ranks(chosen.engine, words)) is not None:
        return code
    from gpc_dist.bench.bench import run_bench

    return run_bench(chosen, options.steps, options.lengths, options.shape, options.json)


COMMAND = Command(
    "Measure what a training step of a recipe costs on this machine.",
    add_arguments,
    run,
    "Real steps on random tokens: time, tokens/s, MFU, memory, communication. Needs no data, and with --shape\n"
    "no encoder either.\n\n"
    "example: gpc-dist bench t5-xl --shape t5-v1_1-xl --lengths fixed --json bench.json",
    settings="recipe",
    on_ranks=True,
)
