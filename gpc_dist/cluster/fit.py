"""How many nodes a run needs, asked of the planner."""

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
        asked: all but the nodes; GPUs of a node are all that a node has when not given.
        gpu: a device the planner knows; what Slurm calls the partition's GPUs when not given.

    Raises:
        UserError: unknown GPUs, or nothing fits on the whole partition.
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
        if chosen := choose(planner, cluster, config.engine):
            print(f"{nodes} node(s). {reason(chosen, cluster, config.engine)}")
            return replace(asked, nodes=nodes, gpus_per_node=per_node)
        nodes *= 2
    raise UserError(reason(None, Cluster(device, partition.nodes, per_node), config.engine))
