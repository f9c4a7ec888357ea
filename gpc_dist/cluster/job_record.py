"""The job of a run: the run's folder `job/`, and the job id in its `facts.json`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from gpc_dist import files
from gpc_dist.cluster.slurm import is_job_id
from gpc_dist.errors import UserError
from gpc_dist.runs.folder import RunFolder, SearchFolder
from gpc_dist.typed import read_as

RECIPE, SEARCH = "recipe.yaml", "search.yaml"
"""Files in the folder `job/`: the recipe or the search that the job runs."""


@dataclass(frozen=True)
class JobRecord:
    """A submission (`job/job.json`)."""

    job_id: str
    """As `slurm.Job.id`."""
    log: str
    submitted_s: float
    """Unix time."""
    command: list[str]
    """The user's command line."""
    sbatch: list[str]
    """The command line of sbatch."""
    code: dict[str, str | bool]
    """Git revision of the submission, see `facts.git_revision`."""


def write_record(folder: RunFolder, record: JobRecord) -> None:
    files.write_json(_path(folder), asdict(record))


def read_record(folder: RunFolder) -> JobRecord | None:
    """The newest submission of a run; None if it was not submitted by this program.

    Raises:
        UserError: the file is not a record.
    """
    return read_as(JobRecord, _path(folder))


def _path(folder: RunFolder) -> Path:
    return folder.job / "job.json"


def job_id(folder: RunFolder) -> str | None:
    """The Slurm job of a run, submitted by this program or by `sbatch`; None for a run without one.

    Raises:
        UserError: what its files name is no job.
    """
    record, facts = read_record(folder), files.read_json(folder.facts)
    found, file = facts.get("slurm_job_id"), folder.facts
    if array := facts.get("slurm_array_job_id"):
        found = f"{array}_{facts.get('slurm_array_task_id')}"
    # a record newer than the run's last start belongs to a job that has not started yet
    newer = record and (not folder.facts.exists() or record.submitted_s > folder.facts.stat().st_mtime)
    if record and newer:
        found, file = record.job_id, _path(folder)
    if found is not None and not is_job_id(found):
        raise UserError(
            f"{file} names the Slurm job {found!r}, which is no id of one: restore or remove the file"
        )
    return found


def run_folders(paths: Iterable[Path]) -> Iterator[RunFolder]:
    """Yield the runs and searches at these paths: each path is the folder of one, or a folder that contains some.

    Raises:
        UserError: a path is not a folder.
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
    """The run or search whose folder this is; None if it is neither."""
    search, run = SearchFolder(path), RunFolder(path)
    if search.config.exists() or (search.job / SEARCH).exists():
        return search
    return run if run.status.exists() or _path(run).exists() else None
