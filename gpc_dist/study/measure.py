"""Measures the chosen adapters of a study on the official validation split, on ranks of this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from gpc_dist.config import EngineConfig
from gpc_dist.distributed import launch
from gpc_dist.errors import EXIT_DONE
from gpc_dist.inference.engine import measured_config
from gpc_dist.interpreter import python
from gpc_dist.runs.folder import RunFolder
from gpc_dist.study.layout import official
from gpc_dist.study.spec import OfficialConfig


def measure_official(trials: Sequence[Path], choice: OfficialConfig) -> int:
    """Measure the adapters of those trials that are not measured yet; returns the exit code.

    Processes of their own do it, so that later searches have all memory and GPUs: the ranks of a run, as far as this
    machine has room for them, and the same ones for all trials with the same engine.

    Args:
        choice: what takes the place of the runs' own engine.

    Raises:
        UserError: the configuration of a trial cannot be read.
    """
    groups: dict[str, list[Path]] = {}
    for trial in trials:
        if not official(trial).exists():
            engine = measured_config(RunFolder(trial).read_config(), choice.settings).engine
            groups.setdefault(engine.model_dump_json(), []).append(trial)
    for described, group in groups.items():
        engine = EngineConfig.model_validate_json(described)
        ranks = launch.fitting_ranks(engine) if choice.ranks is None else choice.ranks
        words = [official(group[0]).name, json.dumps(choice.settings), *map(str, group)]
        if code := launch.start_ranks(python("gpc_dist.inference.official", *words), ranks):
            return code
    return EXIT_DONE
