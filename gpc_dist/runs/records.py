"""Reads runs from their folders for a comparison; `tracking.experiment` reads them from MLflow."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpc_dist import files
from gpc_dist.errors import UserError
from gpc_dist.runs.folder import RunFolder
from gpc_dist.runs.metrics import STEP, TIME, read_metrics
from gpc_dist.runs.result import RunResult
from gpc_dist.tasks.metrics import LOWER_IS_BETTER
from gpc_dist.typed import is_number, read_as

TRAIN_LOSS = "train/loss"
EVALUATION = "val/"
# a record has the seed in a field of its own; the other keys do not change what is learnt
_NO_SETTINGS = ("run.", "tracking.", "train.resume")
_DIGITS = 10
"""Of the largest seed."""

Curve = list[tuple[int, float]]
"""Steps and finite values."""


@dataclass(frozen=True)
class Record:
    """The data of one run, finished or not."""

    name: str
    task: str
    seed: int
    settings: Mapping[str, Any]
    """Dotted key -> value, for all keys but the seed that can change what is learnt or its cost."""
    main_metric: str | None
    """The metric that selected the best checkpoint; None before the first evaluation."""
    best: Mapping[str, float]
    """Metrics of the best evaluation; empty before the first one."""
    baseline: Mapping[str, float]
    """Metrics of the majority baseline; empty for an unfinished run, which has not written them yet."""
    curves: Mapping[str, Curve]
    """`train/loss`, and `val/...` of the evaluations."""
    state: str
    reason: str = ""
    started_s: float = 0.0
    wall_s: float | None = None
    """Duration of the run's latest start in seconds."""
    share_s: float | None = None
    """For a trial that shared its encoder with others: its share of their common time, in seconds."""
    ranks: int | None = None
    on_gpu: bool = False
    energy_j: float | None = None
    command: str = ""
    """The user's command line."""
    again: Sequence[str] = field(default_factory=list)
    """Command lines that repeat the run in a new folder."""

    @property
    def cost_s(self) -> float | None:
        """Seconds summed over all ranks: of GPUs, or of CPU processes."""
        seconds = self.wall_s if self.share_s is None else self.share_s
        return None if seconds is None or self.ranks is None else seconds * self.ranks


def read_folder(place: Path) -> list[Record]:
    """The runs in a run folder (one), in a search's folder (its trials), or in a folder of run folders.

    Raises:
        UserError: the folder has no run, or a file of a run is broken.
    """
    inside = place / "trials" if (place / "trials").is_dir() else place
    candidates = [place, *sorted(path for path in inside.iterdir() if path.is_dir())]
    folders = [run for run in map(RunFolder, candidates) if run.config.is_file()]
    if not folders:
        raise UserError(
            f"{place} holds no run: give a folder of run folders such as runs, a search's folder, "
            "or the name of an MLflow experiment"
        )
    return [_read_run(folder) for folder in folders]


def _read_run(folder: RunFolder) -> Record:
    status, trial = folder.read_status(), files.read_json(folder.path / "trial.json")
    result = read_as(RunResult, folder.result)
    state: str = "finished" if result else status.state
    if decision := trial.get("decision"):
        state = f"{state} ({decision})"
    shown = Path(folder.path.name)
    return make_record(
        folder.path.name,
        config=folder.read_config(),
        result=result,
        facts=files.read_json(folder.facts),
        lines=read_metrics(folder.metrics),
        state=state,
        reason=status.reason,
        started_s=status.started_s,
        again=[f"gpc-dist train {shlex.quote(str(_relative(folder.config)))} {new_folder(shown.name)}"],
    )


def _relative(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def new_folder(name: str) -> str:
    """Settings that give a repetition a new folder, so that it does not resume the run that it repeats."""
    again = f"{name}-again"
    return shlex.join(["--run.name", again, "--run.dir", f"runs/{again}"])


def make_record(
    name: str,
    *,
    config: Mapping[str, Any],
    result: RunResult | None,
    facts: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    state: str,
    reason: str,
    started_s: float,
    again: Sequence[str],
) -> Record:
    keys = flatten(config)
    known = result or RunResult()
    main = known.main_metric or keys.get("task.metric") or _guessed_metric(lines)
    last_s = max((line[TIME] for line in lines if TIME in line), default=0.0)
    return Record(
        name=name,
        task=str(known.task or keys.get("task.name") or "unknown"),
        seed=_seed(keys),
        settings={key: value for key, value in keys.items() if not key.startswith(_NO_SETTINGS)},
        main_metric=main,
        best=_finite(known.metrics.best) if result else _best_evaluation(lines, main),
        baseline=_finite(known.majority_baseline),
        curves=_curves(lines),
        state=state,
        reason=reason,
        started_s=started_s,
        wall_s=known.wall_s or (last_s - started_s if 0 < started_s < last_s else None),
        share_s=known.share_s,
        ranks=known.world_size or _configured_ranks(keys, facts),
        on_gpu="gpu" in facts and keys.get("engine.device") != "cpu",
        energy_j=known.energy_j,
        command=str(facts.get("command", "")),
        again=again,
    )


def flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """A nested mapping under dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flatten(value, f"{path}{key}.")
        else:
            found[f"{path}{key}"] = value
    return found


def _seed(keys: Mapping[str, Any]) -> int:
    """The seed of a run, which MLflow has as text; 0 if what stands there is none."""
    given = str(keys.get("run.seed"))
    return int(given) if given.isdecimal() and len(given) <= _DIGITS else 0


def _configured_ranks(keys: Mapping[str, Any], facts: Mapping[str, Any]) -> int | None:
    """Ranks of an unfinished run; None if the machine or the batch system chose them."""
    ranks = keys.get("engine.ranks")
    return ranks if isinstance(ranks, int) and "slurm_job_id" not in facts else None


def _guessed_metric(lines: Iterable[Mapping[str, Any]]) -> str | None:
    """The main metric of a run that does not name it: tasks report it as the average, or else first."""
    for line in lines:
        names = [key.removeprefix(EVALUATION) for key in line if key.startswith(EVALUATION)]
        names = [name for name in names if name != "loss"]
        if names:
            return "average" if "average" in names else names[0]
    return None


def _best_evaluation(lines: Iterable[Mapping[str, Any]], main: str | None) -> dict[str, float]:
    key = f"{EVALUATION}{main}"
    evaluations = [line for line in lines if is_number(line.get(key))]
    if not evaluations:
        return {}
    choose = min if main in LOWER_IS_BETTER else max
    best = choose(evaluations, key=lambda line: line[key])  # the first of equal ones, as in training
    return _finite(
        {name.removeprefix(EVALUATION): best[name] for name in best if name.startswith(EVALUATION)}
    )


def _curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for line in lines:
        for key, value in line.items():
            if (key == TRAIN_LOSS or key.startswith(EVALUATION)) and is_number(value):
                curves.setdefault(key, []).append((int(line[STEP]), float(value)))
    return curves


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if is_number(value)}
