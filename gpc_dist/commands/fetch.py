"""`gpc-dist fetch`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gpc_dist import config
from gpc_dist.commands.command import Command, add_recipe
from gpc_dist.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--convert",
        metavar="DIR",
        type=Path,
        help="also write a copy of the encoder, for encoder.path: without a decoder, as safetensors",
    )
    parser.add_argument(
        "--dtype",
        choices=["bf16", "fp32"],
        help="of the copy; by default engine.dtype, or bf16 where that is auto",
    )


def run(options: Any, settings: dict[str, str], _: list[str]) -> int:
    if options.dtype and not options.convert:
        raise UserError("--dtype is that of a copy: give --convert DIR too")
    chosen = config.load(options.recipe, settings)
    from gpc_dist.cluster.fetch import run_fetch

    return run_fetch(chosen, options.convert, options.dtype)


COMMAND = Command(
    "Download what a recipe needs: encoder, tokenizer and data.",
    add_arguments,
    run,
    "For compute nodes without network: run it on a login node that shares the cache (HF_HOME) with them, and\n"
    "submit with HF_HUB_OFFLINE=1.\n\n"
    "--convert goes on where it was stopped, and compares each tensor of the copy with the checkpoint.\n\n"
    "example: gpc-dist fetch t5-xl --convert encoders/t5-xl --dtype bf16\n"
    "         gpc-dist train t5-xl --encoder.path encoders/t5-xl",
    settings="recipe",
)
