"""Measures adapters of finished runs on the official validation split, and records their decision for each example.

A process that runs this module is one rank: `python -m gpc_dist.inference.official NAME CHOSEN RUN...`, see `main`.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gpc_dist import files, logs
from gpc_dist.config import Config
from gpc_dist.distributed.world import World, joined
from gpc_dist.errors import EXIT_DONE, UserError
from gpc_dist.inference.adapters import adapter_outputs, open_adapter
from gpc_dist.inference.engine import measured_config
from gpc_dist.runs.folder import RunFolder
from gpc_dist.shown import shown_lines
from gpc_dist.tasks import Example, Task, judged, make_task
from gpc_dist.training.saved_adapter import load_on_all


def evaluate_official(runs: Sequence[Path], name: str, chosen: Mapping[str, Any], world: World) -> None:
    """Measure the adapter of each run on the official validation split, and write the result to the run's folder. Every
    rank must call it.

    The file holds the task's metrics on the split, those of the majority baseline, and for each example its id, its
    target, the decision, and what else scoring needs.

    Args:
        runs: folders of finished runs; those with the same encoder and engine share one loaded encoder, unless it was
            fine-tuned.
        name: name of the file. A run that has the file already is skipped.
        chosen: dotted keys of an engine that replace the runs' own, see `measured_config`.

    Raises:
        UserError: the data, the adapter or its encoder cannot be read.
    """
    # rank 0 says which, because the others might see a file that it has just written
    missing = world.from_main([str(run) for run in dict.fromkeys(runs) if not (run / name).exists()])
    groups: list[list[_Run]] = []
    for run in map(RunFolder, missing):
        config = measured_config(run.read_config(), chosen)
        group = next((group for group in groups if _share(group[0].config, config)), None)
        if group is None:
            groups.append(group := [])
        group.append(_Run(run, config))
    for group in groups:
        _measure(group, name, world)
        gc.collect()  # two encoders need not fit; modules of transformers refer to each other


class _Run(NamedTuple):
    folder: RunFolder
    config: Config


def _measure(runs: Sequence[_Run], name: str, world: World) -> None:
    """Measure the adapters of runs that share an encoder."""
    session = open_adapter(runs[0].folder.adapter, runs[0].config, world)
    adapter = session.model.adapter
    for number, (run, config) in enumerate(runs):
        if number > 0:
            adapter, card = load_on_all(run.adapter, world)
            card.check_encoder(session.base.identity, session.base.parts.shape)
            adapter = adapter.to(world.device)
            same = (config.task, config.data) == (session.config.task, session.config.data)
            session = session.of(config, session.task if same else make_task(config.task, config.data))
        examples = session.task.read("validation")
        outputs = adapter_outputs(session, session.split(examples), adapter)
        world.on_main(partial(_write, run.path / name, session.task, examples, outputs))


def _write(path: Path, task: Task, examples: Sequence[Example], outputs: Any) -> None:
    found = {
        "task": task.name,
        "metric": task.main_metric,
        "metrics": task.measure(examples, outputs),
        "majority_baseline": task.majority_baseline(task.read("train"), examples),
        "examples": judged.describe(examples, task.decide(outputs).tolist()),
    }
    files.write_text(path, json.dumps(found, ensure_ascii=False, allow_nan=False) + "\n")


def _share(one: Config, other: Config) -> bool:
    """Whether a session of one configuration can run an adapter of the other."""
    alike = one.adapter.entry == other.adapter.entry and not one.adapter.trains_encoder
    return alike and (one.encoder, one.engine) == (other.encoder, other.engine)


def main(words: Sequence[str]) -> int:
    """Be one rank of `evaluate_official`, for runs with the same engine; returns the exit code.

    Args:
        words: the file's name, the chosen keys as JSON, and the runs' folders.
    """
    name, chosen, *folders = words
    runs, values = [Path(folder) for folder in folders], json.loads(chosen)
    logs.configure(0)
    try:
        with joined(measured_config(RunFolder(runs[0]).read_config(), values).engine) as world:
            evaluate_official(runs, name, values, world)
    except UserError as error:
        print(f"gpc-dist: error: {shown_lines(str(error))}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
