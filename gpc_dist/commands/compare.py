"""`gpc-dist compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gpc_dist.commands.command import Command
from gpc_dist.errors import EXIT_DONE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", metavar="PLACE", help="folder, or MLflow experiment")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write one page with everything in it")
    parser.add_argument("--png", metavar="DIR", type=Path, help="write the plots as PNG files")
    parser.add_argument("--metric", metavar="NAME", help="rank by this metric; the task's own when not given")
    parser.add_argument(
        "--uri",
        help="MLflow tracking URI [MLFLOW_TRACKING_URI, or mlflow.db in runs, or here]",
    )


def run(options: Any, _: dict[str, str], __: list[str]) -> int:
    from gpc_dist.reports.comparison import compare, comparison_table

    comparisons = compare(options.place, options.metric, options.uri)
    print("\n\n".join(map(comparison_table, comparisons)))
    if options.html or options.png:
        from gpc_dist.reports.page import write_comparison

        for file in write_comparison(comparisons, options.place, options.html, options.png):
            print(f"wrote {file}")
    return EXIT_DONE


COMMAND = Command(
    "Rank the configurations of many runs: a table, plots, and a page to keep or send.",
    add_arguments,
    run,
    "PLACE is a folder of runs, a search's folder, or else the name of an MLflow experiment. Runs that differ\n"
    "only in seed, name and folder are one configuration.\n\n"
    "example: gpc-dist compare runs --html compare.html",
)
