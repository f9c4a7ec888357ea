"""The type of a command, and argument types that several commands use."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gpc_dist.errors import UserError

Run = Callable[[Any, dict[str, str], list[str]], int]
"""Takes the parsed arguments, the settings (dotted key -> text), and the words of the whole command line after
`gpc-dist`. Returns the exit code."""


@dataclass(frozen=True)
class Command:
    """A command: its help, its arguments, and the function that it calls."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Run
    detail: str = ""
    settings: Literal["none", "recipe", "own"] = "none"
    """Settings that it takes: none, those of a recipe (`--section.key VALUE`), or those of its own kind of file."""
    on_ranks: bool = False
    """Whether it may be one of several ranks, as the environment says."""

    @property
    def usage(self) -> str:
        """The part of the usage line about settings."""
        return {"none": "", "recipe": " [--section.key VALUE ...]", "own": " [--key VALUE ...]"}[
            self.settings
        ]


ENGINE_OF_RUN = (
    "It runs on the ranks and at the ZeRO stage of the (first) adapter's run, if that stands in the run's folder;\n"
    "--engine.ranks, --engine.zero_stage and the like choose others."
)
"""Part of the help of commands that use an adapter, see `inference.engine`."""
_MOST = 10**6


def count(text: str) -> int:
    """Argument type: a whole number above 0, up to a million."""
    number = int(text)
    if not 1 <= number <= _MOST:
        raise ValueError
    return number


def check_output(path: Path, option: str = "--output") -> None:
    """Refuse a place to which nothing could be written, before the work and not after it."""
    place = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    if above := next((folder for folder in path.absolute().parents if folder.is_file()), None):
        raise UserError(f"{option} {path} cannot be written: {above} is a file")
    if not os.access(place, os.W_OK):
        raise UserError(f"{option} {path} cannot be written: you may not write to {place}")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the argument of commands that take a recipe as `gpc-dist train` does."""
    parser.add_argument("recipe", metavar="RECIPE", help="as of `gpc-dist train`")
