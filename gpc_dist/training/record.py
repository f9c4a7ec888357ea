"""Files in a run's folder that are written before and after training."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from gpc_dist import files
from gpc_dist.adapter import store
from gpc_dist.config import Config
from gpc_dist.distributed import checkpoint
from gpc_dist.runs import facts
from gpc_dist.runs.folder import RunFolder
from gpc_dist.tasks import Example, Task, selection_part
from gpc_dist.training.run import Run

log = logging.getLogger(__name__)


def open_folder(
    folder: RunFolder,
    config: Config,
    argv: Sequence[str],
    task: Task,
    train: list[Example],
    validation: list[Example],
) -> None:
    """Prepare the folder of a run that begins, or that resumes if `train.resume` is true.

    Args:
        argv: command line that reproduces the run.

    Raises:
        UserError: an earlier run in this folder is still being recorded.
    """
    files.recover_folder(folder.adapter, store.NAMES)
    files.check_replaceable(folder.adapter, store.NAMES)
    if not config.train.resume:
        if folder.checkpoints.exists() or folder.adapter.exists():
            log.info("train.resume is false: the checkpoints and the adapter in %s are removed", folder)
        folder.start_over()
        checkpoint.remove_all(folder.checkpoints)
        files.remove_folder(folder.adapter, store.NAMES)
    folder.result.unlink(missing_ok=True)
    folder.write_status("running")
    files.write_text(folder.config, config.to_yaml())
    digest = hashlib.sha256(repr([(e.rows, e.target) for e in train]).encode()).hexdigest()
    described = {
        "dataset": {
            "name": task.name,
            "source": str(config.data.path),
            "digest": digest,
            "train_examples": len(train),
            "validation_examples": len(validation),
        },
        "signature": {"inputs": dict.fromkeys(task.columns, "string")},
    }
    files.write_json(folder.facts, facts.collect_facts(argv) | described)


def _states(run: Run) -> dict[str, Any]:
    """Where the prompt enters, and what keeping the text states that enter with it took."""
    held = [split.states.bytes for split in (run.training, run.validation) if split.states is not None]
    total_s = run.speed.total_s + run.filled_s
    return {
        "first_layer": run.session.model.first_layer,
        "state_cache_mib": sum(held) / 2**20,
        "state_cache_s": run.filled_s,
        "samples_per_s_with_state_cache": run.speed.examples / total_s if run.speed.examples else None,
    }


def run_result(run: Run) -> dict[str, Any]:
    """Return the contents of `result.json`; the caller adds memory, energy and total time."""
    session, config, position = run.session, run.config, run.position
    return {
        "task": session.task.name,
        "method": config.adapter.method,
        "main_metric": session.task.main_metric,
        "selected_on": selection_part(config.data),
        "metrics": {"best": position.best, "last": position.last, "best_step": position.best_step},
        **session.task.by_class(position.best_confusion),
        "majority_baseline": session.task.majority_baseline(run.training.examples, run.validation.examples),
        "steps": position.step,
        "seed": config.run.seed,
        "world_size": session.world.size,
        "zero_stage": config.engine.zero_stage,
        "encoder": session.base.identity.dump(),
        "origin": position.origin and asdict(position.origin),
        "trainable_parameters": run.optimizer.parameters,
        "frozen_parameters": 0 if config.adapter.trains_encoder else session.base.parameters,
        **run.speed.figures(),
        **_states(run),
        "load_s": session.load_s,
    }
