"""`gpc-dist train`."""

from __future__ import annotations

import argparse
import signal
from typing import Any

from gpc_dist import config
from gpc_dist.commands.command import Command
from gpc_dist.distributed import launch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", metavar="RECIPE", help=f"a YAML file, or one of: {', '.join(config.recipe_names())}"
    )


def run(options: Any, settings: dict[str, str], words: list[str]) -> int:
    chosen = config.load(options.recipe, settings)
    started_s = launch.command_started_s()
    if (code := launch.run_as_ranks(chosen.engine, words)) is not None:
        return code
    from gpc_dist.training.stop import StopRequest

    stop = StopRequest()
    stop.listen(signal.SIGUSR2)  # a batch system may send it before torch is imported
    from gpc_dist.training.train import run_training

    return run_training(chosen, started_s, ["gpc-dist", *words], stop)


COMMAND = Command(
    "Train an adapter.",
    add_arguments,
    run,
    "Writes one folder (run.dir, by default runs/<run.name>): configuration, metrics, checkpoints, the best\n"
    "adapter and result.json. Stopped or killed, the same command goes on from the last checkpoint.\n\n"
    "example: gpc-dist train rte --data.path SuperGLUE/RTE --engine.ranks 2 --train.lr 3e-3",
    settings="recipe",
    on_ranks=True,
)
