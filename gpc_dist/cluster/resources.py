"""The resources that a job requests from Slurm, and a check that the cluster has them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gpc_dist.cluster.slurm import Partition, seconds
from gpc_dist.errors import UserError


@dataclass(frozen=True)
class Resources:
    """Resources of one job; None leaves the choice to the batch script or to Slurm."""

    nodes: int = 1
    gpus_per_node: int | None = None
    ranks_per_node: int | None = None
    """When not given: one for each GPU, or one without GPUs."""
    cpus_per_rank: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    memory: str | None = None
    """Memory of a node, such as `64G`."""
    constraint: str | None = None
    dependency: str | None = None
    """As sbatch takes it, such as `afterok:123`."""
    others: tuple[str, ...] = ()
    """Further options of sbatch, passed unchanged."""

    @property
    def _ranks(self) -> int:
        """Ranks of a node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    def options(self) -> list[str]:
        """Options of `sbatch`."""
        cpus = self.cpus_per_rank and self.cpus_per_rank * self._ranks
        named = {
            "nodes": self.nodes,
            "gpus-per-node": self.gpus_per_node,
            "ntasks-per-node": self.ranks_per_node,
            # per GPU if there are any: the script sets --cpus-per-gpu, and sbatch then takes no other count
            "cpus-per-gpu": math.ceil(cpus / self.gpus_per_node) if cpus and self.gpus_per_node else None,
            "mincpus": cpus if not self.gpus_per_node else None,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "mem": self.memory,
            "constraint": self.constraint,
            "dependency": self.dependency,
        }
        given = [f"--{name}={value}" for name, value in named.items() if value is not None]
        # a dependency that can never be met would leave the job waiting for ever
        given += ["--kill-on-invalid-dep=yes"] if self.dependency else []
        return [*given, *self.others]

    def check(self, partitions: Sequence[Partition]) -> Partition:
        """Check that the partition has these resources, and return it.

        Raises:
            UserError: the partition does not exist, is down, or has less than is requested.
        """
        partition = self._partition(partitions)
        where = f"partition '{partition.name}'"
        if not partition.is_up:
            raise UserError(f"{where} is down: choose another --partition ({_names(partitions)})")
        asked = (
            ("--nodes", self.nodes, partition.nodes, "nodes"),
            ("--gpus-per-node", self.gpus_per_node or 0, partition.gpus, "GPUs on a node"),
            (
                "--cpus-per-rank",
                (self.cpus_per_rank or 1) * self._ranks,
                partition.cpus,
                "CPUs on a node, for all its ranks",
            ),
        )
        for option, wanted, there, what in asked:
            if wanted > there:
                raise UserError(f"{option}: {wanted} are asked for, {where} has {there} {what}")
        limit_s = seconds(self.time) if self.time else None
        if limit_s is not None and partition.max_s is not None and limit_s > partition.max_s:
            raise UserError(
                f"--time {self.time} is longer than {where} allows ({partition.max_s / 3600:g} h): ask for less; a "
                "run that reaches its limit saves its state and goes on in the next start of its job"
            )
        return partition

    def _partition(self, partitions: Sequence[Partition]) -> Partition:
        for partition in partitions:
            if partition.name == self.partition or (self.partition is None and partition.is_default):
                return partition
        if self.partition is None:
            raise UserError(f"this cluster has no default partition: give --partition ({_names(partitions)})")
        raise UserError(f"--partition '{self.partition}' does not exist: use one of {_names(partitions)}")


def _names(partitions: Sequence[Partition]) -> str:
    return ", ".join(p.name + (" (default)" if p.is_default else "") for p in partitions)
