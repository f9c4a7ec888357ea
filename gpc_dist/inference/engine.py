"""The engine on which an adapter is used: that of its run, or another one by choice. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpc_dist import config as configuration
from gpc_dist.config import Config
from gpc_dist.distributed import launch
from gpc_dist.errors import UserError
from gpc_dist.runs.folder import RunFolder
from gpc_dist.schema import mapping
from gpc_dist.shown import one_line

_KEPT = (
    "ranks",
    "zero_stage",
    "offload_param",
    "nvme_path",
    "dtype",
    "device",
    "quantize",
    "token_table",
    "state_cache",
    "timeout_s",
)
"""Keys of a run's engine that hold for the use of its adapter; the others are for training steps."""
_OF_A_STAGE = ("offload_param", "nvme_path")
"""Keys that mean nothing at another stage than the run's."""


def engine_of(adapter: Path, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `engine` that the run of an adapter gives it; none for an adapter that stands in no run's folder.

    Offload to NVMe becomes offload to the CPU: a folder that others wrote must not say where this program writes.

    Args:
        adapter: folder of the adapter.
        chosen: dotted keys that the user gives.

    Raises:
        UserError: the run's configuration is not valid.
    """
    path = Path(os.path.abspath(adapter))
    run = RunFolder(path.parent)
    if path != run.adapter or not (run.config.is_file() and run.status.is_file()):
        return {}
    tree = run.read_config()
    try:
        kept = _kept(tree, chosen)
        if kept.pop("nvme_path", None) and kept.get("offload_param") == "nvme":
            kept["offload_param"] = "cpu"
        configuration.apply({"engine": kept}, {})
    except UserError as error:
        raise UserError(f"{run.config} is not valid: {one_line(error)}") from None
    return kept


def measured_config(tree: Mapping[str, Any], chosen: Mapping[str, Any]) -> Config:
    """The configuration with which the adapter of a run is measured on the whole official validation split.

    Args:
        tree: configuration of the run.
        chosen: dotted keys that replace the run's; without effect on a run that trained its encoder.

    Raises:
        UserError: they cannot be used together.
    """
    if mapping("adapter", tree.get("adapter")).get("method") == "fine-tuning":
        chosen = {}
    whole = {"data.limit_eval": None}
    return configuration.apply({**tree, "engine": _kept(tree, chosen)}, {**chosen, **whole})


def _kept(tree: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    held = mapping("engine", tree.get("engine"))
    left_out = _OF_A_STAGE if {"engine.zero_stage", "engine.plan"} & chosen.keys() else ()
    return {key: held[key] for key in _KEPT if key in held and key not in left_out}


def run_as_ranks(adapter: Path, settings: Mapping[str, str], words: Sequence[str]) -> int | None:
    """`launch.run_as_ranks` on the ranks of the adapter's run, as far as this machine has room for them, or on
    `engine.ranks` of the settings."""
    engine = configuration.build({"engine": engine_of(adapter, settings)}, dict(settings)).engine
    if "engine.ranks" not in settings:
        engine = engine.model_copy(update={"ranks": launch.fitting_ranks(engine)})
    return launch.run_as_ranks(engine, words)
