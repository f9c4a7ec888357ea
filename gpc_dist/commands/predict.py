"""`gpc-dist predict`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from gpc_dist.commands.command import ENGINE_OF_RUN, Command
from gpc_dist.errors import UserError
from gpc_dist.inference import engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="adapter folder of a run")
    parser.add_argument("--input", required=True, type=Path, help="JSONL, CSV, TSV or Parquet file")
    parser.add_argument("--output", required=True, type=Path, help="file to write, or a folder")


def run(options: Any, settings: dict[str, str], words: list[str]) -> int:
    if not options.input.is_file():
        raise UserError(f"--input {options.input} does not exist")
    _check_output(options.output)
    if (code := engine.run_as_ranks(options.adapter, settings, words)) is not None:
        return code
    from gpc_dist.inference.adapters import run_prediction

    return run_prediction(options.adapter, options.input, options.output, settings)


def _check_output(path: Path) -> None:
    """Refuse what nothing could be written to, before the work and not after it."""
    if path.is_file() and not path.suffix:
        raise UserError(
            f"--output {path} is a file, and a name without an ending is a folder's: give {path}.jsonl"
        )
    place = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    if above := next((folder for folder in path.absolute().parents if folder.is_file()), None):
        raise UserError(f"--output {path} cannot be written: {above} is a file")
    if not os.access(place, os.W_OK):
        raise UserError(f"--output {path} cannot be written: you may not write to {place}")


COMMAND = Command(
    "Write a trained adapter's predictions for a file.",
    add_arguments,
    run,
    "A packaged task is written in its benchmark's submission format, any other as JSON lines with the\n"
    "probability of each label, or as CSV if the output's name ends in .csv. The input has the text columns of\n"
    "the training data; its `id` is kept, and a label column is not read.\n\n"
    f"{ENGINE_OF_RUN}\n\n"
    "example: gpc-dist predict runs/rte/adapter --input SuperGLUE/RTE/test.jsonl --output RTE.jsonl",
    settings="recipe",
    on_ranks=True,
)
