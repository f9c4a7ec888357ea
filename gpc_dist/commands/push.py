"""`gpc-dist push`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gpc_dist.commands.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="adapter folder of a run")
    parser.add_argument("repo_id", metavar="HUB_ID", help="model repository, such as my-name/rte-gpc")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")


def run(options: Any, _: dict[str, str], __: list[str]) -> int:
    from gpc_dist.inference.publish import run_push

    return run_push(options.adapter, options.repo_id, options.private)


COMMAND = Command(
    "Upload an adapter to the Hugging Face Hub, with a model card.",
    add_arguments,
    run,
    "The card tells task, data, figures, the encoder and its fingerprint, and how to load the adapter; local\n"
    "paths stay here. The Hub's token is that of `hf auth login`, or HF_TOKEN.\n\n"
    "example: gpc-dist push runs/rte/adapter my-name/rte-gpc",
)
