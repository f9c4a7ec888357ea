"""What is known of a run's job: the folder `job/` of the run, and the run's own facts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from gpc_dist import files
from gpc_dist.errors import UserError
from gpc_dist.runs.folder import RunFolder, SearchFolder

RECIPE, SEARCH = "recipe.yaml", "search.yaml"
"""In the job's folder: what is run."""


@dataclass(frozen=True)
class JobRecord:
    """A submission (`job/job.json`)."""

    job_id: str
    """As `slurm.Job.id`."""
    log: str
    submitted_s: float
    """Unix time."""
    command: list[str]
    """The user's."""
    sbatch: list[str]
    """What was submitted."""
    code: dict[str, str | bool]
    """The revision it was submitted from."""


def write_record(folder: RunFolder, record: JobRecord) -> None:
    files.write_json(_path(folder), asdict(record))


def read_record(folder: RunFolder) -> JobRecord | None:
    """The newest submission of a run; None if it was not submitted by this program."""
    values = files.read_json(_path(folder))
    known = {field.name for field in fields(JobRecord)}
    return JobRecord(**{key: value for key, value in values.items() if key in known}) if values else None


def _path(folder: RunFolder) -> Path:
    return folder.job / "job.json"


def job_id(folder: RunFolder) -> str | None:
    """The Slurm job of a run, submitted by this program or by `sbatch`; None for a run without one."""
    record, facts = read_record(folder), files.read_json(folder.facts)
    started: str | None = facts.get("slurm_job_id")
    if array := facts.get("slurm_array_job_id"):
        started = f"{array}_{facts['slurm_array_task_id']}"
    if record is None:
        return started
    # a record newer than the run's last start is of a job that still waits
    newer = not folder.facts.exists() or record.submitted_s > folder.facts.stat().st_mtime
    return record.job_id if newer else started


def run_folders(paths: Iterable[Path]) -> Iterator[RunFolder]:
    """The runs and searches at these paths: each is the folder of one, or a folder of them.

    Raises:
        UserError: a path is neither.
    """
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is no folder: give a run's folder, or one with runs in it")
        if folder := _folder(path):
            yield folder
            continue
        for inside in sorted(path.iterdir()):
            if inside.is_dir() and (folder := _folder(inside)):
                yield folder


def _folder(path: Path) -> RunFolder | None:
    """The run or the search that has its folder here; None if neither has."""
    search, run = SearchFolder(path), RunFolder(path)
    if search.config.exists() or (search.job / SEARCH).exists():
        return search
    return run if run.status.exists() or _path(run).exists() else None
