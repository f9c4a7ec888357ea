"""`gpc-dist submission`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gpc_dist.commands.command import ENGINE_OF_RUN, Command, check_output
from gpc_dist.errors import UserError
from gpc_dist.inference import engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folder")
    parser.add_argument("--output", metavar="FILE", required=True, type=Path, help="zip file to write")
    parser.add_argument(
        "--data",
        metavar="DIR",
        type=Path,
        help="the benchmark's folder, with BoolQ, CB, ..., AX-g in it [the data of each run, diagnostics beside RTE]",
    )


def run(options: Any, settings: dict[str, str], words: list[str]) -> int:
    from gpc_dist.runs.best import best_runs
    from gpc_dist.tasks.archive import TRAINED, check_replaceable

    if wrong := [key for key in settings if not key.startswith(("engine.", "encoder."))]:
        raise UserError(
            f"--{wrong[0]} cannot be one for all tasks: give keys of engine and encoder, and --data"
        )
    check_output(options.output)
    check_replaceable(options.output)
    best = best_runs(options.runs, TRAINED)
    first = next(best[task] for task in TRAINED if task in best)
    if (code := engine.run_as_ranks(first.folder.adapter, settings, words)) is not None:
        return code
    from gpc_dist.inference.submission import run_submission

    return run_submission(best, options.data, options.output, settings)


COMMAND = Command(
    "Write a whole SuperGLUE submission: the test splits as the best runs answer them.",
    add_arguments,
    run,
    "Of each task's runs it takes the one with the best validation figure; the one of rte answers the diagnostics\n"
    "AX-b and AX-g, too. Says which files are missing.\n\n"
    f"{ENGINE_OF_RUN}\n\n"
    "example: gpc-dist submission runs/* --data SuperGLUE --output superglue.zip",
    settings="recipe",
    on_ranks=True,
)
