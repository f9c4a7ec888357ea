"""`gpc-dist doctor`."""

from __future__ import annotations

import argparse
from typing import Any

from gpc_dist.commands.command import Command, count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slurm", action="store_true", help="check the cluster")
    parser.add_argument(
        "--partition", metavar="P", help="partition of the check; the default one when not given"
    )
    parser.add_argument("--nodes", metavar="N", type=count, default=2, help="nodes of the check [2]")
    parser.add_argument(
        "--gpus-per-node", metavar="N", type=count, help="check their GPUs, and nccl between them"
    )


def run(options: Any, _: dict[str, str], __: list[str]) -> int:
    from gpc_dist.cluster.environment import examine, report

    if options.slurm:
        from gpc_dist.cluster.check import examine_cluster

        return report(examine_cluster(options.partition, options.nodes, options.gpus_per_node))
    return report(examine())


COMMAND = Command(
    "Say what this machine, or a Slurm cluster, has and what is missing.",
    add_arguments,
    run,
    "With --slurm: partitions, and a job of a minute on a few nodes that checks the shared folder, the\n"
    "connection between them, clocks, disks and versions.",
)
