"""`gpc-dist similarity`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gpc_dist.commands.command import ENGINE_OF_RUN, Command, check_output
from gpc_dist.errors import UserError
from gpc_dist.inference import engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapters", metavar="ADAPTER", nargs="+", type=Path, help="adapter folders of runs, two or more"
    )
    parser.add_argument(
        "--probe",
        metavar="FILE",
        type=Path,
        help="JSONL, CSV, TSV or Parquet file of texts [those of the demo's validation split]",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", type=Path, help="write similarity.json and similarity.png there"
    )


def run(options: Any, settings: dict[str, str], words: list[str]) -> int:
    if options.probe is not None and not options.probe.is_file():
        raise UserError(f"--probe {options.probe} does not exist")
    if options.output is not None:
        check_output(options.output)
        if options.output.is_file():
            raise UserError(f"--output {options.output} is a file: give a folder")
    if (code := engine.run_as_ranks(options.adapters[0], settings, words)) is not None:
        return code
    from gpc_dist.reports.similarity import run_similarity

    return run_similarity(options.adapters, options.probe, options.output, settings)


COMMAND = Command(
    "Show how alike adapters are, to choose one to start another task from.",
    add_arguments,
    run,
    "Three cosines of each two: of the means of their prompts' tokens, the mean over all pairs of tokens, and of the\n"
    "changes that they make to the states of some texts. The column of the texts is `text`, or what\n"
    "--task.text '[COLUMN]' says, or two columns. The adapters have one encoder.\n\n"
    f"{ENGINE_OF_RUN}\n\n"
    "example: gpc-dist similarity runs/sst2/adapter runs/cb/adapter runs/rte/adapter --output alike",
    settings="recipe",
    on_ranks=True,
)
