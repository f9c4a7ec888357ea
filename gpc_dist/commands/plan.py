"""`gpc-dist plan`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gpc_dist import config
from gpc_dist.commands.command import Command, add_recipe, count
from gpc_dist.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--nodes", metavar="N", type=count, help="equal nodes [1]")
    parser.add_argument("--gpus-per-node", metavar="N", type=count, help="ranks of a node [8]")
    parser.add_argument(
        "--gpu", metavar="NAME", help="h100, h200, b200, a100-80, a100-40, l40s, a10, l4, a4000 or cpu [h100]"
    )
    parser.add_argument(
        "--gpu-memory-gib",
        metavar="GIB",
        type=float,
        help="memory of one GPU; the device's own when not given",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole plan there too")
    parser.add_argument(
        "--clusters", action="store_true", help="say instead what to take on each of the usual clusters"
    )


def run(options: Any, settings: dict[str, str], _: list[str]) -> int:
    one = (options.gpu, options.gpu_memory_gib, options.nodes, options.gpus_per_node, options.json)
    if options.clusters and any(each is not None for each in one):
        raise UserError(
            "--clusters names its own clusters: leave out --gpu, --nodes and the others, or --clusters"
        )
    chosen = config.load(options.recipe, settings)
    from gpc_dist.planner.report import run_clusters, run_plan

    if options.clusters:
        return run_clusters(chosen)
    return run_plan(
        chosen,
        options.gpu or "h100",
        options.gpu_memory_gib,
        options.nodes or 1,
        options.gpus_per_node or 8,
        options.json,
    )


COMMAND = Command(
    "Say whether and how a recipe fits on a cluster, how fast it would be, and how to run it.",
    add_arguments,
    run,
    "From the encoder's configuration alone: no weights, no GPU. A model, not a measurement.\n\n"
    "examples: gpc-dist plan t5-xl --nodes 4 --gpus-per-node 8 --gpu a100-40\n"
    "          gpc-dist plan t5-xl --clusters --encoder.path google/t5-xxl-lm-adapt",
    settings="recipe",
)
