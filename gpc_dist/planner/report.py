"""`gpc-dist plan`: memory and speed of a recipe on a cluster, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from gpc_dist import files
from gpc_dist.config import Config
from gpc_dist.errors import EXIT_DONE
from gpc_dist.planner.devices import DEVICES, GIB, find_device
from gpc_dist.planner.planner import HEAD_ROOM, Estimate, Planner, scaling
from gpc_dist.planner.recipe import Choice, choose, make_planner, reason
from gpc_dist.planner.regime import regimes_for
from gpc_dist.planner.timing import Cluster
from gpc_dist.planner.workload import Workload

SCALED_NODES = (1, 2, 4, 8, 16, 32, 64)
CLUSTERS = [
    Cluster(DEVICES[gpu], nodes, per_node)
    for gpu in ("a4000", "a10", "a100-40", "h100")  # 16, 24, 40 and 80 GB
    for nodes, per_node in ((1, 1), (1, 4), (1, 8), (2, 8))
]
"""Clusters that many have."""

_WORDS = {"regime", "nodes", "cluster", "take", "why"}
"""Columns that hold words."""
_NOTE = "Estimates, not measurements (docs/planner.md)."


def run_plan(
    config: Config, gpu: str, memory_gib: float | None, nodes: int, per_node: int, json_file: Path | None
) -> int:
    """Print memory and speed of a recipe on a cluster; returns the exit code.

    Raises:
        UserError: an unknown device, or an encoder whose configuration cannot be found.
    """
    cluster = Cluster(find_device(gpu, memory_gib), nodes, per_node)
    planner = _planner(config, cluster)
    estimates = [planner.estimate(regime, cluster) for regime in regimes_for(nodes, per_node)]
    choice = choose(planner, cluster, config.engine)
    chosen = choice.estimate if choice else None
    print(_run_line(config, planner.workload))
    print(_cluster_line(cluster))
    print(_late(planner.workload, cluster), end="")
    print(f"{_NOTE} Columns frozen to total: GiB of a GPU; host: GiB of a node.\n")
    print(_regime_table(estimates))
    print(f"\n{reason(choice, cluster, config.engine)}")
    scaled = scaling(planner, chosen.regime, cluster, SCALED_NODES) if chosen else []
    if chosen:
        print(f"\n{chosen.regime.name} on more nodes, {chosen.rows} rows per GPU: a model, not a measurement")
        print(_scaling_table(scaled))
    if json_file:
        files.write_json(
            json_file,
            {
                "encoder": config.encoder.path,
                "cluster": asdict(cluster),
                "workload": asdict(planner.workload),
                "regimes": [_dump(e) for e in estimates],
                "recommended": chosen.regime.name if chosen else None,
                "scaling": [_dump(e) | {"nodes": n} for n, e in zip(SCALED_NODES, scaled, strict=False)],
            },
        )
    return EXIT_DONE


def run_clusters(config: Config) -> int:
    """Print which regime to take for a recipe on each of `CLUSTERS`; returns the exit code.

    Raises:
        UserError: an encoder whose configuration cannot be found.
    """
    planner = _planner(config, CLUSTERS[0])
    print(_run_line(config, planner.workload))
    print(f"{_NOTE} GiB: taken of a GPU, {HEAD_ROOM:.0%} of which is kept free.\n")
    print(_table([_choice_line(cluster, choose(planner, cluster, config.engine)) for cluster in CLUSTERS]))
    return EXIT_DONE


def _planner(config: Config, cluster: Cluster) -> Planner:
    return make_planner(config, cluster.device, outputs=len(config.task.labels or ()) or 2)


def _run_line(config: Config, workload: Workload) -> str:
    weights = workload.weights
    frozen = weights.total + (workload.lower.total if workload.lower else 0)
    return (
        f"{config.encoder.path}: {frozen / 1e6:,.0f} M frozen parameters of {weights.element_bytes} bytes, "
        f"{workload.adapter / 1e6:.2f} M trained; {workload.rows} rows of {workload.prompt_tokens} + "
        f"{workload.tokens} tokens a step"
    )


def _cluster_line(cluster: Cluster) -> str:
    device = cluster.device
    return (
        f"{cluster.nodes} x {cluster.per_node} {device.name}: {device.memory_gib:g} GiB, "
        f"{device.peak_tflops:g} TFLOPS, {device.memory_gb_s:g} GB/s memory, {device.link_gb_s:g} GB/s in a node, "
        f"{device.network_gb_s:g} GB/s between nodes"
    )


def _late(workload: Workload, cluster: Cluster) -> str:
    """What caching the text states takes, a line; empty if none are cached."""
    lower = workload.lower
    if lower is None:
        return ""
    forward_s = cluster.arithmetic_s(2.0 * lower.matrices * workload.tokens) / cluster.size
    mib = workload.states_row_bytes * 1000 / 2**20
    return (
        f"text states are computed once, by {lower.layers} layers with {lower.total / 1e6:,.0f} M parameters, which "
        f"later runs leave out; for 1,000 rows at most {mib:,.1f} MiB and {1000 * forward_s:,.2g} s\n"
    )


def _regime_table(estimates: Sequence[Estimate]) -> str:
    return _table([_regime_line(e) for e in estimates])


def _regime_line(e: Estimate) -> dict[str, str]:
    m = e.memory
    sizes = {
        "frozen": m.frozen,
        "gathered": m.gathered,
        "activations": m.activations,
        "trained": m.trained,
        "work": m.workspace,
        "total": m.total,
        "host": e.host_bytes,
    }
    return {
        "regime": e.regime.name,
        **{name: f"{size / GIB:.2f}" for name, size in sizes.items()},
        "MB sent": f"{e.sent_bytes / 1e6:,.1f}",
        "step ms": f"{1000 * e.step_s:,.1f}",
        "MFU %": f"{100 * e.mfu:.1f}",
        "rows": str(e.micro_rows),
        "most rows": str(e.most_rows),
        "fits": "yes" if e.fits else "no",
    }


def _choice_line(cluster: Cluster, choice: Choice | None) -> dict[str, str]:
    line = {"cluster": f"{cluster.nodes} x {cluster.per_node} {cluster.device.name}"}
    if choice is None:
        return line | {"take": "nothing fits"}
    e = choice.estimate
    return line | {
        "take": e.regime.name,
        "why": choice.why,
        "GiB": f"{e.memory.total / GIB:.2f} of {cluster.device.memory_gib:g}",
        "rows": str(e.micro_rows),
        "step ms": f"{1000 * e.step_s:,.1f}",
        "rows/s": f"{e.rows_per_s:,.1f}",
    }


def _scaling_table(estimates: Sequence[Estimate]) -> str:
    lines = [
        {
            "nodes": str(nodes),
            "rows a step": f"{e.rows_per_s * e.step_s:,.0f}",
            "step ms": f"{1000 * e.step_s:,.1f}",
            "rows/s": f"{e.rows_per_s:,.0f}",
            "communication %": f"{100 * e.communication_share:.1f}",
            "MFU %": f"{100 * e.mfu:.1f}",
        }
        for nodes, e in zip(SCALED_NODES, estimates, strict=True)
    ]
    return _table(lines)


def _table(lines: list[dict[str, str]]) -> str:
    columns = max(lines, key=len)
    align = ["left" if name in _WORDS else "right" for name in columns]
    return tabulate(lines, headers="keys", disable_numparse=True, colalign=align)


def _dump(estimate: Estimate) -> dict[str, Any]:
    return asdict(estimate) | {
        "name": estimate.regime.name,
        "total_gib": estimate.memory.total / GIB,
        "fits": estimate.fits,
    }
