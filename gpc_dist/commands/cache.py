"""`gpc-dist cache`."""

from __future__ import annotations

import argparse
from typing import Any

from gpc_dist.commands.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--remove", metavar="CACHE", nargs="+", default=[], help="remove these caches; `all` for all"
    )
    parser.add_argument(
        "--older-than",
        metavar="DAYS",
        type=_days,
        help="remove the caches that were not used for so many days",
    )


def _days(text: str) -> float:
    days = float(text)
    if not 0 <= days < 1e6:
        raise ValueError
    return days


def run(options: Any, _: dict[str, str], __: list[str]) -> int:
    from gpc_dist.encoder.cache_list import run_cache

    return run_cache(options.remove, options.older_than)


COMMAND = Command(
    "Show or remove cached text states.",
    add_arguments,
    run,
    "Runs with adapter.first_layer above 0, and linear probes, keep what the lower layers make of their data in\n"
    "the folder GPC_DIST_CACHE, by default ~/.cache/gpc-dist/states, and in Slurm jobs one of each node (see\n"
    "engine.state_cache). What is removed is computed again when it is needed.\n\n"
    "example: gpc-dist cache --older-than 30\n"
    "         srun -w NODE gpc-dist cache        what jobs keep on a node",
)
