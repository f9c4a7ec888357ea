"""How long a step takes on a cluster: a model from datasheet figures, not a measurement.

With n bytes of weights outside the token table, and s bytes that a pass saves:

    arithmetic   the FLOPs of the dry run, over 55 % of the device's peak
    memory       (n + 2s) bytes forward, (n + 3s) backward, over 80 % of its bandwidth
    launches     5 us for each operator; the host issues them one after the other (none on a CPU: it is the host)

A pass takes the longest of the three, forward and backward apart; with activation checkpointing the backward
pass holds another forward pass, with the FLOPs that are recomputed in the dry run. int8 weights are read, written
out in the encoder's type and read again before each use, which nothing hides.

A collective over W ranks in M nodes of G moves its bytes inside nodes and between them at the same time, at
70 % of the links' bandwidth, and starts after 10 us and 1 us for each rank:

    all-gather of b bytes   max(b (W-1)/W / link, b (M-1)/M / (G network)); an all-reduce is twice that

ZeRO-3 gathers the next layer while one runs: of arithmetic and gathering the longer one counts, and the first
layer's gathering. A shard in host memory comes over the host link at 80 %, one on NVMe at 6 GB/s for a node.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpc_dist.planner.devices import Device

ARITHMETIC_SHARE = 0.55
MEMORY_SHARE = 0.8
LINK_SHARE = 0.7
OPERATOR_S = 5e-6
COLLECTIVE_S = 10e-6
RANK_S = 1e-6
NVME_GB_S = 6.0


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal devices."""

    device: Device
    nodes: int
    per_node: int

    @property
    def size(self) -> int:
        """W."""
        return self.nodes * self.per_node

    def gather_s(self, size_bytes: float, collectives: int = 1) -> float:
        """Seconds of an all-gather of `size_bytes` in all, in so many calls."""
        if self.size == 1:
            return 0.0
        inside = size_bytes * (self.size - 1) / self.size / (self.device.link_gb_s * 1e9)
        if self.per_node == 1:
            inside = 0.0
        between = (
            size_bytes * (self.nodes - 1) / self.nodes / (self.per_node * self.device.network_gb_s * 1e9)
        )
        return max(inside, between) / LINK_SHARE + collectives * (COLLECTIVE_S + RANK_S * self.size)

    def reduce_s(self, size_bytes: float, collectives: int = 1) -> float:
        """Seconds of an all-reduce of `size_bytes`, in so many calls."""
        return 2 * self.gather_s(size_bytes, collectives)

    def fetch_s(self, size_bytes: float, nvme: bool) -> float:
        """Seconds to bring `size_bytes` of each rank from its host, or from NVMe, to its device."""
        rate = self.device.host_link_gb_s * MEMORY_SHARE
        if nvme:
            rate = min(rate, NVME_GB_S / self.per_node)
        return size_bytes / (rate * 1e9)

    def arithmetic_s(self, flops: float) -> float:
        return flops / (self.device.peak_tflops * 1e12 * ARITHMETIC_SHARE)

    def memory_s(self, size_bytes: float) -> float:
        return size_bytes / (self.device.memory_gb_s * 1e9 * MEMORY_SHARE)

    def launch_s(self, operators: float) -> float:
        return 0.0 if self.device.is_cpu else operators * OPERATOR_S
