"""`gpc-dist submission`: SuperGLUE's test splits and diagnostics as the best adapter of each task answers them, in one
zip file with the benchmark's names."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from gpc_dist import files
from gpc_dist.adapter.store import read_card
from gpc_dist.config import Config
from gpc_dist.distributed.world import World, joined
from gpc_dist.errors import EXIT_DONE, UserError
from gpc_dist.inference.adapters import adapter_config, open_adapter, outputs_of_test
from gpc_dist.inference.engine import engine_of
from gpc_dist.runs.best import Finished
from gpc_dist.shown import one_line, shown_cells
from gpc_dist.tasks import answered_by, file_name, make_task, submission
from gpc_dist.tasks.archive import LINES, packed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Part:
    """One file of the submission: who answers, with which configuration."""

    run: Finished
    config: Config


def run_submission(
    best: Mapping[str, Finished], data: Path | None, output: Path, overrides: Mapping[str, str]
) -> int:
    """Write the submission, and print what is in it and what is missing; returns the exit code. All adapters run on the
    ranks of the first.

    Args:
        best: a run for each task, see `best_runs`.
        data: the benchmark's folder; the data of each run when not given, and for a diagnostic the folder beside that
            of RTE.
        output: the zip file.
        overrides: dotted keys of the configuration.

    Raises:
        UserError: an adapter or its encoder cannot be used.
    """
    parts, missing = _parts(best, data, overrides)
    if not parts:
        raise UserError(f"nothing to submit: {'; '.join(f'{n}: {why}' for n, why in missing.items())}")
    texts = {}
    with joined(next(iter(parts.values())).config.engine) as world:
        for task, part in parts.items():
            if (text := _answered(part, world)) is not None:
                texts[task] = text
            gc.collect()  # two encoders need not fit; modules of transformers refer to each other
        if world.is_main:
            files.write_bytes(output, packed({file_name(task): text for task, text in texts.items()}))
            print(f"{_table(parts, texts)}\n\nwritten to {output}")
            if missing:
                print("missing:", *(f"  {name}: {why}" for name, why in missing.items()), sep="\n")
    return EXIT_DONE


def _parts(
    best: Mapping[str, Finished], data: Path | None, overrides: Mapping[str, str]
) -> tuple[dict[str, _Part], dict[str, str]]:
    """The parts by task, and by file why one is missing; the data of each has been read once."""
    parts, missing = {}, {}
    for task in LINES:
        trained = answered_by(task) or task
        if (run := best.get(trained)) is None:
            missing[file_name(task)] = f"no run of task {trained} was given"
            continue
        adapter = run.folder.adapter
        card, engine = read_card(adapter), engine_of(adapter, overrides)
        chosen = dict(overrides)
        if data is not None:
            chosen["data.path"] = str((data / _folder_name(task)).absolute())
        if task != trained:
            own = adapter_config(card, overrides).data.path
            chosen = {"task.name": task, "data.path": _beside(own, task), **chosen}
        config = adapter_config(card, chosen, engine)
        try:
            make_task(config.task, config.data).read("test")
        except UserError as error:
            missing[file_name(task)] = one_line(error)
            continue
        parts[task] = _Part(run, config)
    return parts, missing


def _folder_name(task: str) -> str:
    """Name of a task's folder in the benchmark's."""
    return Path(file_name(task)).stem


def _beside(path: str | None, task: str) -> str:
    """Where a diagnostic is, from where RTE is: in the folder beside it, or under the same Hub id."""
    if path is None or not Path(path).exists():
        return str(path)
    return str(Path(path).absolute().parent / _folder_name(task))


def _answered(part: _Part, world: World) -> str | None:
    """The content of a part's file, on rank 0."""
    session = open_adapter(part.run.folder.adapter, part.config, world)
    examples, outputs = outputs_of_test(session)
    return None if outputs is None else submission(session.task, examples, outputs)


def _table(parts: Mapping[str, _Part], texts: Mapping[str, str]) -> str:
    rows = []
    for task, text in texts.items():
        run, lines = parts[task].run, text.count("\n")
        rows.append([file_name(task), lines, str(run.folder), run.metric, run.value])
        if lines != LINES[task]:
            log.warning(
                "%s has %d lines, and the benchmark asks for %d: give the whole test split",
                file_name(task),
                lines,
                LINES[task],
            )
    return tabulate(shown_cells(rows), ["file", "lines", "run", "metric", "best"], floatfmt=".4f")
