"""`gpc-dist export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gpc_dist.commands.command import Command, check_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="adapter folder of a run")
    parser.add_argument("--peft", metavar="DIR", required=True, type=Path, help="folder to write for PEFT")


def run(options: Any, settings: dict[str, str], _: list[str]) -> int:
    check_output(options.peft, "--peft")
    from gpc_dist.inference.interchange import run_export

    return run_export(options.adapter, options.peft, settings)


COMMAND = Command(
    "Make an adapter of method prompt-tuning one of PEFT's.",
    add_arguments,
    run,
    "Where its head is the one that the encoder's family has in transformers, as a classifier (SEQ_CLS); else as a\n"
    "prompt on the bare encoder, whose states a head in head.safetensors reads.\n\n"
    "example: gpc-dist export runs/rte-prompt-tuning/adapter --peft peft-rte",
    settings="recipe",
)
