"""`gpc-dist import`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gpc_dist.commands.command import Command, check_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peft", metavar="DIR", required=True, type=Path, help="folder of PEFT's adapter")
    parser.add_argument("--output", metavar="DIR", required=True, type=Path, help="adapter folder to write")


def run(options: Any, settings: dict[str, str], _: list[str]) -> int:
    check_output(options.output)
    from gpc_dist.inference.interchange import run_import

    return run_import(options.peft, options.output, settings)


COMMAND = Command(
    "Make an adapter of one that PEFT's prompt tuning or P-tuning trained.",
    add_arguments,
    run,
    "It computes the same logits. --encoder.path names the checkpoint that PEFT's adapter was trained on; with\n"
    "--task.name and --data.path (the labels in the order of its outputs) it can be evaluated and predict.\n\n"
    "example: gpc-dist import --peft peft-rte --output rte --encoder.path bert-base-uncased --task.name rte",
    settings="recipe",
)
