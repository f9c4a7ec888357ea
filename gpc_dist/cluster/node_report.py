"""Measures one node for a cluster check; `srun` runs this module as one rank of a small job.

srun --nodes 2 --ntasks-per-node 1 python -P -m gpc_dist.cluster.node_report FOLDER TOKEN
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from gpc_dist import files
from gpc_dist.runs.facts import package_versions

TOKEN, REPORT = "token", "report.json"
_JOIN_S = 60
_MIB = 64
_REPEATS = 5


@dataclass(frozen=True)
class NodeReport:
    """One node's part of the report."""

    host: str
    python: str
    versions: dict[str, str]
    gpus: int
    sees_folder: bool
    """The node reads the file that the submitting machine wrote, with the expected content."""
    free_gib: float
    """In the shared folder."""
    free_local_gib: float
    """For temporary files."""
    clock_s: float
    """Unix time just after all ranks met."""


def main(folder: Path, token: str) -> None:
    """Join the other ranks and measure; rank 0 writes `report.json` into the folder."""
    import torch

    from gpc_dist.config import EngineConfig
    from gpc_dist.distributed.world import init_world

    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        WORLD_SIZE=os.environ["SLURM_NTASKS"],
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        MASTER_ADDR=_first_host(),
        MASTER_PORT=str(20000 + int(os.environ["SLURM_JOB_ID"]) % 12000),
    )
    start = time.monotonic()
    world = init_world(EngineConfig(timeout_s=_JOIN_S))
    met_s, clock_s = time.monotonic() - start, time.time()
    marker = folder / TOKEN
    own = NodeReport(
        host=socket.gethostname(),
        python=platform.python_version(),
        versions=package_versions(),
        gpus=torch.cuda.device_count(),
        sees_folder=marker.is_file() and marker.read_text(encoding="utf-8") == token,
        free_gib=_free_gib(folder if folder.is_dir() else Path.cwd()),
        free_local_gib=_free_gib(Path(os.environ.get("TMPDIR", "/tmp"))),
        clock_s=clock_s,
    )
    reports = world.gather(asdict(own))
    values = torch.zeros(_MIB * 2**18, device=world.device)
    seconds = []
    for _ in range(_REPEATS):
        world.any(False)  # all begin together
        start = time.monotonic()
        world.sum(values)
        values[0].item()  # wait for the device
        seconds.append(time.monotonic() - start)
    if reports is not None:  # on rank 0
        # each byte crosses the slowest link 2 (size - 1) / size times in a ring
        gb = 2 * (world.size - 1) / world.size * values.nbytes / 1e9
        found = {
            "nodes": reports,
            "met_s": met_s,
            "gb_per_s": gb / min(seconds),
            "backend": "nccl" if world.device.type == "cuda" else "gloo",
        }
        files.write_json(folder / REPORT, found)
    world.leave()


def _first_host() -> str:
    nodes = os.environ["SLURM_JOB_NODELIST"]
    done = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
    )
    return done.stdout.split()[0]


def _free_gib(folder: Path) -> float:
    return shutil.disk_usage(folder).free / 2**30


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
