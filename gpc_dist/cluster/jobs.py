"""`gpc-dist jobs` and `gpc-dist cancel`: list and cancel this project's jobs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from gpc_dist.cluster import slurm
from gpc_dist.cluster.job_record import job_id, run_folders
from gpc_dist.errors import UserError
from gpc_dist.runs.folder import RunFolder, SearchFolder, Status
from gpc_dist.runs.metrics import TIME, read_metrics
from gpc_dist.runs.result import SearchResult
from gpc_dist.shown import shown_cells
from gpc_dist.typed import is_number, read_as

_PROGRESS = "train/progress_pct"


def jobs_table(paths: Sequence[Path]) -> str:
    """A table with one line for each run that has a job: Slurm's state, progress, metrics, and the time left.

    Raises:
        UserError: a path is not a folder.
        MachineError: Slurm is not installed or does not answer.
    """
    found = {folder: number for folder in run_folders(paths) if (number := job_id(folder)) is not None}
    known = slurm.jobs(found.values())
    lines = [_line(folder, number, known.get(number)) for folder, number in found.items()]
    headers = ["run", "job", "state", "nodes", "elapsed", "progress", "metrics", "left", "said"]
    return tabulate(shown_cells(lines), headers=headers) if lines else "no jobs"


def _line(folder: RunFolder, number: str, job: slurm.Job | None) -> list[Any]:
    status = folder.read_status()
    state, said = _state(status, job, folder.status.exists())
    done, left_s = _done(folder, status)
    moving = job is not None and job.state == "RUNNING" and left_s is not None
    return [
        folder.path.name,
        number,
        state,
        job.nodes if job and not job.ended else "",
        job.elapsed if job and not job.ended else "",
        done,
        _metrics(folder),
        tqdm.format_interval(left_s) if moving and left_s is not None else "",
        said,
    ]


def _state(status: Status, job: slurm.Job | None, started: bool) -> tuple[str, str]:
    """The state and its reason: Slurm's until the job has ended, then the run's."""
    if job is not None and not job.ended:
        return job.state.lower(), job.reason if job.state == "PENDING" else ""
    if not started:
        return (job.state.lower() if job else "gone"), "it never started"
    if status.state == "running":
        return "lost", f"Slurm says {job.state if job else 'nothing of it'}: see its log"
    return status.state, status.reason


def pace(lines: Sequence[dict[str, Any]], since_s: float) -> tuple[float | None, float | None]:
    """Progress of a run in percent, and the seconds left at the pace of its latest start; None where unknown.

    Args:
        lines: lines of `metrics.jsonl`.
        since_s: unix time of the latest start.
    """
    steps = [
        (line[TIME], line[_PROGRESS]) for line in lines if TIME in line and is_number(line.get(_PROGRESS))
    ]
    if not steps:
        return None, None
    (last_s, progress), mine = steps[-1], [step for step in steps if step[0] >= since_s]
    if len(mine) < 2 or mine[0][1] >= progress:
        return progress, None
    per_pct = (last_s - mine[0][0]) / (progress - mine[0][1])
    return progress, max(0.0, per_pct * (100 - progress) - (time.time() - last_s))


def _done(folder: RunFolder, status: Status) -> tuple[str, float | None]:
    """Progress of a run or a search as text, and the seconds left; None where unknown."""
    if isinstance(folder, SearchFolder):
        begun = folder.begun_trials()
        ended = sum(trial.read_status().state != "running" for trial in begun)
        return f"{ended} of {len(begun)} trials", None
    progress, left_s = pace(read_metrics(folder.metrics), status.started_s)
    return "" if progress is None else f"{progress:.0f} %", left_s


def _metrics(folder: RunFolder) -> str:
    """Metrics of the newest evaluation without the loss; for a search that has ended, the best trial's metric."""
    if isinstance(folder, SearchFolder):
        found = read_as(SearchResult, folder.result)
        if found is None or found.best_trial is None or found.best is None:
            return ""
        return f"{found.metric} {found.best:.4g} (trial {found.best_trial})"
    for line in reversed(read_metrics(folder.metrics)):
        values = {
            key[4:]: value for key, value in line.items() if key.startswith("val/") and key != "val/loss"
        }
        if values:
            return ", ".join(f"{key} {value:.4g}" for key, value in values.items() if is_number(value))
    return ""


def cancel_jobs(names: Sequence[str]) -> list[str]:
    """Cancel jobs, given by their ids or by the folders of their runs; return the ids.

    The runs save their state first. The id of an array cancels all of its tasks.

    Raises:
        UserError: a name is neither an id nor a folder, a run has no job, or Slurm refuses.
    """
    ids = []
    for name in names:
        if slurm.is_job_id(name):
            ids.append(name)
            continue
        for folder in run_folders([Path(name)]):
            number = job_id(folder)
            if number is None:
                raise UserError(f"{folder} has no job")
            ids.append(number)
    slurm.cancel(ids)
    return ids
