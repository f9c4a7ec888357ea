"""`gpc-dist sync`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from gpc_dist.commands.command import Command
from gpc_dist.errors import EXIT_DONE
from gpc_dist.shown import shown

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "places", metavar="PLACE", type=Path, nargs="+", help="folder of a run or of a search"
    )
    parser.add_argument("--uri", help="MLflow tracking URI; the folder's own when not given")


def run(options: Any, _: dict[str, str], __: list[str]) -> int:
    from gpc_dist.runs.folder import RunFolder, SearchFolder
    from gpc_dist.tracking.sync import sync

    # a shell's runs/* gives everything that lies there
    known = [p for p in options.places if RunFolder(p).config.exists() or SearchFolder(p).config.exists()]
    for other in options.places if known else []:
        if other not in known:
            log.warning("left out: %s is not the folder of a run or of a search", other)
    for folder in known or options.places:
        state = sync(folder, options.uri)
        print(shown(f"{folder}: MLflow run {state.run_id} is up to date"))
    return EXIT_DONE


COMMAND = Command(
    "Bring MLflow up to date with the folder of a run or of a search.",
    add_arguments,
    run,
    "For those whose tracking server was down or out of reach. Nothing is recorded twice.\n"
    "What is neither a run nor a search is left out, and named.\n\nexample: gpc-dist sync runs/*",
)
