"""`gpc-dist cancel`."""

from __future__ import annotations

import argparse
from typing import Any

from gpc_dist.commands.command import Command
from gpc_dist.errors import EXIT_DONE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jobs", metavar="JOB|RUN", nargs="+", help="a job's id, or the folder of its run")


def run(options: Any, _: dict[str, str], __: list[str]) -> int:
    from gpc_dist.cluster.jobs import cancel_jobs

    print(f"asked to end: {', '.join(cancel_jobs(options.jobs))}")
    return EXIT_DONE


COMMAND = Command("End Slurm jobs; their runs save their state first.", add_arguments, run)
