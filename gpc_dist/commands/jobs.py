"""`gpc-dist jobs`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from gpc_dist.commands.command import Command
from gpc_dist.errors import EXIT_DONE

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        metavar="RUN",
        type=Path,
        nargs="*",
        help="folder of a run or a search, or of several [runs, searches]",
    )


def run(options: Any, _: dict[str, str], __: list[str]) -> int:
    from gpc_dist.cluster.jobs import jobs_table

    usual = [path for path in (Path("runs"), Path("searches")) if path.is_dir()]
    # a shell's runs/* gives files too
    for file in filter(Path.is_file, options.runs):
        log.warning("left out: %s is not a folder", file)
    print(jobs_table([path for path in options.runs if not path.is_file()] if options.runs else usual))
    return EXIT_DONE


COMMAND = Command("Show this project's Slurm jobs.", add_arguments, run)
