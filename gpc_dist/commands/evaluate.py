"""`gpc-dist evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gpc_dist.commands.command import ENGINE_OF_RUN, Command
from gpc_dist.inference import engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="adapter folder of a run")
    parser.add_argument(
        "--split",
        choices=["validation", "holdout"],
        default="validation",
        help="the official split, or what data.holdout kept out of training [validation]",
    )


def run(options: Any, settings: dict[str, str], words: list[str]) -> int:
    if (code := engine.run_as_ranks(options.adapter, settings, words)) is not None:
        return code
    from gpc_dist.inference.adapters import run_evaluation

    return run_evaluation(options.adapter, options.split, settings)


COMMAND = Command(
    "Measure a trained adapter on its task's validation split.",
    add_arguments,
    run,
    "Prints JSON: the metrics and, for a classification, precision, recall and F1 of each label and the confusion\n"
    "matrix. An adapter of rte answers SuperGLUE's diagnostics, too: --task.name axb (Matthews correlation), or axg\n"
    "(accuracy, gender parity).\n\n"
    f"{ENGINE_OF_RUN}\n\n"
    "example: gpc-dist evaluate runs/rte/adapter --data.path SuperGLUE/RTE",
    settings="recipe",
    on_ranks=True,
)
