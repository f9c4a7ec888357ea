"""`gpc-dist predict`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gpc_dist.commands.command import ENGINE_OF_RUN, Command, check_output
from gpc_dist.errors import UserError
from gpc_dist.inference import engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="adapter folder of a run")
    parser.add_argument(
        "--input",
        type=Path,
        help="JSONL, CSV, TSV or Parquet file [the test split of the adapter's data]",
    )
    parser.add_argument("--output", required=True, type=Path, help="file to write, or a folder")


def run(options: Any, settings: dict[str, str], words: list[str]) -> int:
    if options.input is not None and not options.input.is_file():
        raise UserError(f"--input {options.input} does not exist")
    if options.output.is_file() and not options.output.suffix:
        raise UserError(
            f"--output {options.output} is a file, and a name without an ending is a folder's: give "
            f"{options.output}.jsonl"
        )
    check_output(options.output)
    if (code := engine.run_as_ranks(options.adapter, settings, words)) is not None:
        return code
    from gpc_dist.inference.adapters import run_prediction

    return run_prediction(options.adapter, options.input, options.output, settings)


COMMAND = Command(
    "Write a trained adapter's predictions for a file, or for its task's test split.",
    add_arguments,
    run,
    "A packaged task is written in its benchmark's submission format, any other as JSON lines with the\n"
    "probability of each label, or as CSV if the output's name ends in .csv. The input has the text columns of\n"
    "the training data; its `id` is kept, and a label column is not read. An adapter of rte answers SuperGLUE's\n"
    "diagnostics, too: --task.name axb, or axg.\n\n"
    f"{ENGINE_OF_RUN}\n\n"
    "example: gpc-dist predict runs/rte/adapter --input SuperGLUE/RTE/test.jsonl --output RTE.jsonl",
    settings="recipe",
    on_ranks=True,
)
