"""`gpc-dist submit`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpc_dist import config
from gpc_dist.commands.command import Command, count
from gpc_dist.errors import UserError

if TYPE_CHECKING:
    from gpc_dist.cluster.resources import Resources


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("what", choices=["train", "tune"], help="a run, or a search")
    add("recipe", metavar="RECIPE|SEARCH", help="as of `gpc-dist train`, or of `gpc-dist tune`")
    add(
        "--nodes",
        metavar="N",
        type=_nodes,
        default=1,
        help="nodes, or `auto`: the fewest on which the planner finds room; implies engine.plan auto [1]",
    )
    add("--gpus-per-node", metavar="N", type=count, help="GPUs of a node, one rank each")
    add("--ranks-per-node", metavar="N", type=count, help="ranks of a node, where they are not its GPUs")
    add("--cpus-per-rank", metavar="N", type=count, help="cores of a rank")
    add("--time", help="limit of one start of the job, such as 12:00:00; the run may take several")
    add("--partition", help="the cluster's default one when not given")
    add("--account")
    add("--qos")
    add("--mem", help="memory of a node, such as 64G")
    add("--constraint", help="features of the nodes")
    add("--dependency", help="as of sbatch, such as afterok:123")
    add(
        "--sbatch",
        metavar="OPTION",
        action="append",
        default=[],
        help="any other option: --sbatch=--exclusive",
    )
    add("--gpu", help="for --nodes auto: as of `gpc-dist plan`, where Slurm does not name it")
    several = parser.add_mutually_exclusive_group()
    several.add_argument(
        "--seeds", metavar="LIST", help="a job array with one run for each seed: 0-3, or 1,5,7"
    )
    several.add_argument(
        "--array",
        metavar="FILE",
        type=Path,
        help="a job array with one run for each line of settings in a file",
    )
    add(
        "--snapshot",
        action="store_true",
        help="the job runs a copy of this program as it is now, whatever becomes of an editable installation",
    )
    add("--dry-run", action="store_true", help="show what would be submitted")
    add("--follow", action="store_true", help="print the log until the job ends")


def _nodes(text: str) -> int | str:
    return text if text == "auto" else count(text)


def run(options: Any, settings: dict[str, str], words: list[str]) -> int:
    from gpc_dist.cluster import members
    from gpc_dist.cluster.submit import run_submission

    resources = _resources(options)
    if options.what == "tune":
        _refuse_for_searches(options)
        from gpc_dist.search import spec

        chosen = members.search(spec.load(options.recipe, settings))
    else:
        if options.nodes == "auto":
            from gpc_dist.cluster.fit import fewest_nodes

            settings |= {"engine.plan": "auto"}
            resources = fewest_nodes(config.load(options.recipe, settings), resources, options.gpu)
        if options.seeds:
            chosen = members.seeds(options.recipe, settings, options.seeds)
        elif options.array:
            chosen = members.lines(options.recipe, settings, options.array)
        else:
            chosen = members.single(options.recipe, settings)
    command = ["gpc-dist", *words]
    return run_submission(
        options.what,
        chosen,
        resources,
        command,
        dry_run=options.dry_run,
        wait=options.follow,
        snapshot=options.snapshot,
    )


def _resources(options: Any) -> Resources:
    from gpc_dist.cluster.resources import Resources

    return Resources(
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        ranks_per_node=options.ranks_per_node,
        cpus_per_rank=options.cpus_per_rank,
        time=options.time,
        partition=options.partition,
        account=options.account,
        qos=options.qos,
        memory=options.mem,
        constraint=options.constraint,
        dependency=options.dependency,
        others=tuple(options.sbatch),
    )


def _refuse_for_searches(options: Any) -> None:
    given = {"--nodes auto": options.nodes == "auto", "--seeds": options.seeds, "--array": options.array}
    for name in (name for name, value in given.items() if value):
        raise UserError(f"{name} is for `submit train`: a search has its own nodes, seeds and settings")


COMMAND = Command(
    "Submit a run or a search to Slurm.",
    add_arguments,
    run,
    "The configuration is kept in the run's folder (job/) as it is now. Stopped by a time limit or a\n"
    "preemption, the job saves its state, requeues itself and goes on: one run in MLflow.\n\n"
    "example: gpc-dist submit train t5-xl --nodes 2 --gpus-per-node 8 --time 12:00:00 --follow\n"
    "         gpc-dist submit tune cb-asha --nodes 2 --gpus-per-node 8 --resources.pack 8",
    settings="recipe",
)
