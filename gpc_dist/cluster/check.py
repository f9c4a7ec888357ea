"""`gpc-dist doctor --slurm`: report a cluster's partitions, and check that its nodes can work together."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpc_dist import files
from gpc_dist.cluster import node_report, slurm
from gpc_dist.cluster.environment import Finding
from gpc_dist.cluster.resources import Resources
from gpc_dist.distributed.launch import SECRET
from gpc_dist.interpreter import python

_PATIENCE_S = 600
"""Limit for the check job, its time in the queue included."""
_SKEW_S = 1.0
_FREE_GIB = 5.0


def examine_cluster(partition: str | None, nodes: int, gpus_per_node: int | None) -> Iterator[Finding]:
    """Yield findings about the partitions, then about a job on some nodes of one of them.

    Raises:
        MachineError: Slurm is not installed or does not answer.
        UserError: the partition does not exist, is down, or has less than is requested.
    """
    partitions = slurm.partitions()
    for found in partitions:
        yield _partition(found)
    resources = Resources(
        nodes=nodes,
        ranks_per_node=gpus_per_node or 1,
        gpus_per_node=gpus_per_node,
        time="5",
        partition=partition,
    )
    resources.check(partitions)
    # in the working folder, because the check is whether the nodes see the user's files
    folder = Path(tempfile.mkdtemp(prefix=".gpc-dist-doctor-", dir=Path.cwd()))
    try:
        yield from _examine_nodes(resources, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _partition(found: slurm.Partition) -> Finding:
    limit = "no time limit" if found.max_s is None else f"limit {found.max_s / 3600:g} h"
    gpus = f"{found.gpus} GPUs {found.gpu_type}".rstrip() if found.gpus else "no GPUs"
    return Finding(
        f"partition {found.name}" + (" (default)" if found.is_default else ""),
        f"{found.nodes} nodes with up to {found.cpus} CPUs, {found.memory_mib / 1024:.0f} GiB, {gpus}; {limit}",
        "" if found.is_up else "it is down: choose another one",
        optional=True,
    )


def _examine_nodes(resources: Resources, folder: Path) -> Iterator[Finding]:
    token = uuid.uuid4().hex
    files.write_text(folder / node_report.TOKEN, token)
    words = ["srun", "--job-name=gpc-dist-doctor", "--kill-on-bad-exit=1", *resources.options()]
    words += python("gpc_dist.cluster.node_report", str(folder), token)
    environment = os.environ | {SECRET: secrets.token_hex(32)}
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_PATIENCE_S, env=environment)
    except subprocess.TimeoutExpired:
        yield Finding(
            "check job",
            f"not through after {_PATIENCE_S} s",
            "the queue is full, or nodes hang: see squeue and sinfo",
        )
        return
    report = files.read_json(folder / node_report.REPORT)
    if done.returncode or not report:
        yield _failure(done.stderr)
        return
    yield from _nodes(report)


def _failure(said: str) -> Finding:
    last = said.strip().splitlines()[-1][:200] if said.strip() else "no message"
    apart = (
        "the nodes cannot reach each other: open TCP ports 20000-32000 between them, or name the right interface "
        "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
    )
    for sign, remedy in (
        ("No such file", f"the nodes lack {sys.executable}: install gpc-dist on a file system they share"),
        (
            "No module named",
            f"the nodes lack packages: install gpc-dist where they find it as {sys.executable} does",
        ),
        (
            "Unable to allocate",
            "Slurm refuses: ask for another --partition, or see your limits (sacctmgr show assoc)",
        ),
        ("imed out", apart),
        ("did not come", apart),
        (
            "onnection",
            "the nodes cannot reach each other: name the right interface (GLOO_SOCKET_IFNAME, "
            "NCCL_SOCKET_IFNAME)",
        ),
    ):
        if sign in said:
            return Finding("check job", last, remedy)
    return Finding("check job", last, "run it by hand: srun --nodes 2 gpc-dist doctor")


def _nodes(report: dict[str, Any]) -> Iterator[Finding]:
    nodes = report["nodes"]
    hosts = sorted({node["host"] for node in nodes})
    yield Finding("rendezvous", f"{len(nodes)} ranks on {', '.join(hosts)} met in {report['met_s']:.1f} s")
    yield Finding("bandwidth", f"{report['gb_per_s']:.2f} GB/s all-reduce ({report['backend']})")
    blind = [node["host"] for node in nodes if not node["sees_folder"]]
    yield Finding(
        "shared folder",
        f"not seen by {', '.join(blind)}" if blind else f"{Path.cwd()} is seen by all",
        "work in a folder on a file system that the nodes share" if blind else "",
    )
    clocks = [node["clock_s"] for node in nodes]
    skew_s = max(clocks) - min(clocks)
    yield Finding(
        "clocks",
        f"{1000 * skew_s:.0f} ms apart",
        "" if skew_s < _SKEW_S else "synchronise them (chrony, ntp)",
    )
    for what, key in (("disk", "free_gib"), ("local disk", "free_local_gib")):
        least = min(nodes, key=lambda node: node[key])
        found = f"at least {least[key]:.0f} GiB free ({least['host']})"
        yield Finding(what, found, "" if least[key] > _FREE_GIB else f"free some space on {least['host']}")
    gpus = sorted({node["gpus"] for node in nodes})
    yield Finding(
        "GPUs",
        f"{gpus[-1]} on each node" if gpus[-1] else "none visible to torch: runs use the CPU over gloo",
        "" if len(gpus) == 1 else f"some nodes show {gpus[0]} only: check their drivers (nvidia-smi)",
        optional=not gpus[-1],
    )
    yield _versions(nodes)


def _versions(nodes: list[dict[str, Any]]) -> Finding:
    named = [node["versions"] | {"python": node["python"]} for node in nodes]
    differing = [key for key in named[0] if len({versions.get(key) for versions in named}) > 1]
    if not differing:
        return Finding("versions", "the same on all nodes: torch " + named[0].get("torch", "missing"))
    seen = "; ".join(f"{key} {', '.join(sorted({str(v.get(key)) for v in named}))}" for key in differing)
    return Finding("versions", seen, "let all nodes use one environment, on a file system they share")
