"""The number of nodes that a run needs, from the planner."""

from __future__ import annotations

from dataclasses import replace

from gpc_dist.cluster import slurm
from gpc_dist.cluster.resources import Resources
from gpc_dist.config import Config
from gpc_dist.errors import UserError
from gpc_dist.planner.devices import DEVICES, find_device
from gpc_dist.planner.recipe import choose, make_planner, reason
from gpc_dist.planner.timing import Cluster


def fewest_nodes(config: Config, asked: Resources, gpu: str | None) -> Resources:
    """`asked` with the fewest nodes (1, 2, 4, ...) on which the planner finds a regime that fits.

    Args:
        asked: the request; its number of nodes is ignored, and without `gpus_per_node` it takes all GPUs of a node.
        gpu: a device of the planner; Slurm's name of the partition's GPUs when not given.

    Raises:
        UserError: the partition has no GPUs or unknown ones, or no regime fits on any of these numbers of nodes.
    """
    partition = replace(asked, nodes=1).check(slurm.partitions())
    per_node = asked.gpus_per_node or partition.gpus
    if not per_node:
        raise UserError(
            f"--nodes auto plans for GPUs, and partition '{partition.name}' has none: give --nodes N"
        )
    name = gpu or partition.gpu_type
    if name not in DEVICES:
        raise UserError(
            f"the GPUs of partition '{partition.name}' are called '{name}', which the planner does not know: give "
            f"--gpu, one of {', '.join(DEVICES)}"
        )
    device = find_device(name)
    planner = make_planner(config, device, outputs=len(config.task.labels or ()) or 2)
    nodes = 1
    while nodes <= partition.nodes:
        cluster = Cluster(device, nodes, per_node)
        if choice := choose(planner, cluster, config.engine):
            print(f"{nodes} node(s). {reason(choice, cluster, config.engine)}")
            return replace(asked, nodes=nodes, gpus_per_node=per_node)
        nodes *= 2
    raise UserError(reason(None, Cluster(device, partition.nodes, per_node), config.engine))
