"""The command line: parse, then call."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from gpc_dist import __version__, config
from gpc_dist.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see `gpc_dist.errors`)."""
    started_s = float(os.environ.get("GPC_DIST_STARTED_S", time.time()))
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    try:
        return options.run(options, rest, started_s, arguments)
    except UserError as error:
        print(f"gpc-dist: error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpc-dist",
        description="Tune a Global Prompt Cell on a frozen pretrained encoder, on one machine or many.",
        epilog="Start with: gpc-dist train demo",
    )
    parser.add_argument("--version", action="version", version=f"gpc-dist {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    train = commands.add_parser(
        "train",
        help="train an adapter",
        usage="gpc-dist train RECIPE [--section.key VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("recipe", metavar="RECIPE")
    train.set_defaults(run=_train)
    return parser


def overrides(arguments: Sequence[str]) -> dict[str, str]:
    """`--a.b c` and `--a.b=c` pairs; raises UserError on anything else or on a key given twice."""
    found: dict[str, str] = {}
    pending = list(arguments)
    while pending:
        word = pending.pop(0)
        if not word.startswith("--"):
            raise UserError(f"unexpected argument '{word}': settings are given as --section.key VALUE")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not pending:
                raise UserError(f"--{key} needs a value")
            value = pending.pop(0)
        if key in found:
            raise UserError(f"--{key} is given twice: keep one of them")
        found[key] = value
    return found


def _train(options: Any, rest: list[str], started_s: float, arguments: list[str]) -> int:
    from gpc_dist.engine import launch

    settings = config.load(options.recipe, overrides(rest))
    ranks = launch.wanted_ranks(settings.engine)
    if ranks > 1 and not launch.given_ranks():
        os.environ["GPC_DIST_STARTED_S"] = str(started_s)
        command = [sys.executable, "-m", "gpc_dist.cli", *arguments]
        return launch.start_ranks(command, ranks, cpu_only=settings.engine.device == "cpu")
    from gpc_dist.training.run import run_training

    return run_training(settings, started_s, ["gpc-dist", *arguments])


if __name__ == "__main__":
    sys.exit(main())
