"""Measures adapters of finished runs on the official validation split, and records their decision for each example."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gpc_dist import config as configuration
from gpc_dist import files
from gpc_dist.adapter.store import load_adapter
from gpc_dist.config import Config
from gpc_dist.distributed.world import alone
from gpc_dist.inference.adapters import adapter_outputs, open_adapter
from gpc_dist.runs.folder import RunFolder
from gpc_dist.tasks import judged
from gpc_dist.training.session import Session

_HERE = {
    "data.limit_eval": None,
    "engine.ranks": 1,
    "engine.zero_stage": 0,
    "engine.offload_param": "none",
    "engine.ds_config": None,
}
"""Settings that replace a run's own for its evaluation: one rank, and the whole split."""


def evaluate_official(runs: Sequence[Path], name: str) -> None:
    """Measure the adapter of each run on the official validation split, and write the result to the run's folder.

    The file holds the task's metrics on the split, those of the majority baseline, and for each example its id, its
    target, the decision, and what else scoring needs.

    Args:
        runs: folders of finished runs; consecutive runs with the same encoder, task, data and engine share one
            loaded encoder, unless it was fine-tuned.
        name: name of the file. A run that has the file already is skipped.

    Raises:
        UserError: the data, the adapter or its encoder cannot be read.
    """
    session: Session | None = None
    for run in map(RunFolder, runs):
        if (run.path / name).exists():
            continue
        settings = configuration.apply(run.read_config(), _HERE)
        if session is None or not _shares(session.config, settings):
            session = open_adapter(run.adapter, settings, alone(settings.engine))
            adapter = session.model.adapter
        else:
            session = replace(session, config=settings)
            adapter, card = load_adapter(run.adapter)
            card.check_encoder(session.base.identity, session.base.parts.shape)
            adapter = adapter.to(session.world.device)
        task = session.task
        examples = task.read("validation")
        outputs = adapter_outputs(session, session.split(examples), adapter)
        found = {
            "task": task.name,
            "metric": task.main_metric,
            "metrics": task.measure(examples, outputs),
            "majority_baseline": task.majority_baseline(task.read("train"), examples),
            "examples": judged.describe(examples, task.decide(outputs).tolist()),
        }
        files.write_text(run.path / name, json.dumps(found, ensure_ascii=False, allow_nan=False) + "\n")


def _shares(one: Config, other: Config) -> bool:
    """Whether a session of one configuration can run an adapter of the other."""
    sections = ("encoder", "task", "data", "engine")
    alike = one.adapter.entry == other.adapter.entry and not one.adapter.trains_encoder
    return alike and all(getattr(one, section) == getattr(other, section) for section in sections)
