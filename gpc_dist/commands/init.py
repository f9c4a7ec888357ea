"""`gpc-dist init`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gpc_dist.commands.command import Command
from gpc_dist.errors import EXIT_DONE
from gpc_dist.shipped import SHIPPED, copy_shipped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path)


def run(options: Any, _: dict[str, str], __: list[str]) -> int:
    copy_shipped(options.folder)
    print(
        f"copied {', '.join(SHIPPED)} to {options.folder}; start with: gpc-dist train {options.folder}/recipes/rte.yaml"
    )
    return EXIT_DONE


COMMAND = Command(
    f"Copy the files that are made to be edited ({', '.join(SHIPPED)}) into a folder.", add_arguments, run
)
