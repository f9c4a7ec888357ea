"""Devices the planner knows, and the one at hand.

Figures are the vendors' own, from their datasheets: dense (no sparsity) bf16 peak of the matrix units, memory
bandwidth, and bandwidths in one direction, where datasheets often give the sum of both.

    h100     NVIDIA H100 SXM5 datasheet: 989 TFLOPS, HBM3 3.35 TB/s, NVLink 4 at 2 x 450 GB/s, PCIe 5
    h200     NVIDIA H200 SXM datasheet: as h100, HBM3e 4.8 TB/s, 141 GB
    b200     NVIDIA DGX B200 datasheet, an eighth of it: 2,250 TFLOPS, 8 TB/s, NVLink 5 at 2 x 900 GB/s, PCIe 5
    a100-80  NVIDIA A100 SXM datasheet: 312 TFLOPS, HBM2e 2.04 TB/s, NVLink 3 at 2 x 300 GB/s, PCIe 4
    a100-40  as a100-80, HBM2 1.56 TB/s
    l40s     NVIDIA L40S datasheet: 362 TFLOPS, GDDR6 864 GB/s, no NVLink: PCIe 4 inside a node too
    a10      NVIDIA A10 datasheet: 125 TFLOPS, GDDR6 600 GB/s, no NVLink
    l4       NVIDIA L4 datasheet, half of its figure with sparsity: 121 TFLOPS, GDDR6 300 GB/s, no NVLink
    a4000    NVIDIA RTX A4000 datasheet, half of its figure with sparsity: 77 TFLOPS, GDDR6 448 GB/s, no NVLink
    cpu      two cores of a server with 256-bit vector units; no datasheet: an order of magnitude

Memory is what the driver reports. The network is that of the vendors' reference designs: one 400 Gbit/s port per
GPU for h100, h200 and b200, one of 200 Gbit/s for the others, 10 Gbit/s for a CPU rank.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import torch

from gpc_dist.distributed.memory import available_bytes
from gpc_dist.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """What one rank runs on. Bandwidths are in 10^9 bytes per second, one direction."""

    name: str
    memory_gib: float
    peak_tflops: float
    """Dense bf16 (float32 on a CPU)."""
    memory_gb_s: float
    link_gb_s: float
    """To the other devices of a node."""
    network_gb_s: float
    """To other nodes, per device."""
    host_link_gb_s: float
    """To the host's memory (PCIe)."""

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"


DEVICES = {
    device.name: device
    for device in (
        # GiB, TFLOPS, and GB/s of the memory, to other devices of the node, to other nodes, to the host
        Device("h100", 79.6, 989.0, 3350.0, 450.0, 50.0, 64.0),
        Device("h200", 140.4, 989.0, 4800.0, 450.0, 50.0, 64.0),
        Device("b200", 179.0, 2250.0, 8000.0, 900.0, 50.0, 64.0),
        Device("a100-80", 80.0, 312.0, 2039.0, 300.0, 25.0, 32.0),
        Device("a100-40", 40.0, 312.0, 1555.0, 300.0, 25.0, 32.0),
        Device("l40s", 45.0, 362.0, 864.0, 32.0, 25.0, 32.0),
        Device("a10", 22.5, 125.0, 600.0, 32.0, 25.0, 32.0),
        Device("l4", 22.5, 121.0, 300.0, 32.0, 25.0, 32.0),
        Device("a4000", 16.0, 77.0, 448.0, 32.0, 25.0, 32.0),
        Device("cpu", 16.0, 0.1, 20.0, 5.0, 1.25, 20.0),
    )
}


def find_device(name: str, memory_gib: float | None = None) -> Device:
    """A device of the table, with another amount of memory if one is given.

    Raises:
        UserError: no such device, or an amount of memory that is not positive.
    """
    device = DEVICES.get(name.lower())
    if device is None:
        raise UserError(f"--gpu '{name}' is not a device the planner knows: give one of {', '.join(DEVICES)}")
    if memory_gib is None:
        return device
    if not 0 < memory_gib < math.inf:
        raise UserError(f"--gpu-memory-gib {memory_gib:g} is no amount of memory: give one above 0")
    return replace(device, memory_gib=memory_gib)


def device_at_hand(device: torch.device) -> Device:
    """This rank's device, with the memory that is free now: on a CPU, that of all ranks of the host."""
    if device.type == "cpu":
        return replace(DEVICES["cpu"], memory_gib=available_bytes() / GIB)
    free, total = torch.cuda.mem_get_info(device)
    return replace(device_named(torch.cuda.get_device_name(device), total / GIB), memory_gib=free / GIB)


def device_named(product: str, memory_gib: float) -> Device:
    """The device of the table with a GPU's product name, or, if there is none, the one nearest in memory: its speeds
    decide how regimes compare, not what fits."""
    gpus = [device for device in DEVICES.values() if not device.is_cpu]
    return min(devices_of(product) or gpus, key=lambda device: abs(device.memory_gib - memory_gib))


def devices_of(product: str) -> list[Device]:
    """The devices of the table with a GPU's product name: they differ in memory. None for a CPU."""
    words = re.findall(r"\w+", product.lower())  # whole words, since an A100 is no a10
    return [d for d in DEVICES.values() if not d.is_cpu and d.name.partition("-")[0] in words]
