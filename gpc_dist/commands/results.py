"""`gpc-dist results`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gpc_dist.commands.command import Command
from gpc_dist.errors import EXIT_DONE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folder")


def run(options: Any, _: dict[str, str], __: list[str]) -> int:
    from gpc_dist.reports.results import results_table

    print(results_table(options.runs))
    return EXIT_DONE


COMMAND = Command(
    "Show finished runs side by side.",
    add_arguments,
    run,
    "What is no finished run is left out, and named.\n\nexample: gpc-dist results runs/*",
)
