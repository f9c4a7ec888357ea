"""`gpc-dist tune`."""

from __future__ import annotations

import argparse
from typing import Any

from gpc_dist import schema
from gpc_dist.commands.command import Command
from gpc_dist.shipped import shipped_folder
from gpc_dist.training.stop import SIGNALS, StopRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = schema.yaml_names(shipped_folder("tune"))
    parser.add_argument("search", metavar="SEARCH", help=f"a YAML file, or one of: {', '.join(names)}")
    parser.add_argument("--resume", action="store_true", help="go on with a search that was cut off")


def run(options: Any, settings: dict[str, str], words: list[str]) -> int:
    from gpc_dist.search import node, spec

    stop = StopRequest()
    stop.listen(*SIGNALS)  # before Ray is imported, which takes seconds
    search = spec.load(options.search, settings)
    if node.is_one():
        return node.run_node(search, words, stop)
    from gpc_dist.search.tuner import Start, run_searches

    return run_searches([Start(search, options.resume)], ["gpc-dist", *words], stop)


COMMAND = Command(
    "Search for good settings: many trials, compared in MLflow.",
    add_arguments,
    run,
    "A search is a YAML file (space, trials, scheduler, resources), with overrides such as --trials 8 or\n"
    "--settings.train.steps 100. With resources.pack K, K trials share one running encoder.\n\n"
    "example: gpc-dist tune demo --trials 4",
    settings="own",
)
