"""`gpc-dist submit`: submit a recipe or a search as a job to Slurm."""

from __future__ import annotations

import re
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from gpc_dist import files
from gpc_dist.cluster import slurm
from gpc_dist.cluster.follow import follow
from gpc_dist.cluster.job_record import RECIPE, SEARCH, JobRecord, job_id, write_record
from gpc_dist.cluster.resources import Resources
from gpc_dist.config import Config
from gpc_dist.errors import EXIT_DONE, UserError
from gpc_dist.runs.facts import git_revision
from gpc_dist.runs.folder import RunFolder
from gpc_dist.shipped import shipped_folder
from gpc_dist.tracking.store import tracking_uri, ui_command

TASK = "{task}"
"""Placeholder for the number of an array task; `slurm/train.sbatch` replaces it."""

SHARED = "job.sh"
"""File that a batch script sources from its own folder."""

_GIVEN = {"train": RECIPE, "tune": SEARCH}


@dataclass(frozen=True)
class Member:
    """One run, or one search, of a submission."""

    task: int | None
    """Number in the job array; None without an array."""
    name: str
    folder: RunFolder
    config: Config
    """Configuration of the run, or the part that a search's runs share; for the checks of its input and tracking."""
    kept: Mapping[str, str]
    """File name -> text, for the folder `job/`: the complete configuration of the job."""


def run_submission(
    what: Literal["train", "tune"],
    members: Sequence[Member],
    resources: Resources,
    command: Sequence[str],
    dry_run: bool,
    wait: bool,
) -> int:
    """Submit one run, an array of runs, or one search; return the exit code.

    Args:
        what: selects the batch script and the file that it gets (`recipe.yaml` or `search.yaml`).
        command: the user's command line, for the record.
        dry_run: print what would be submitted, and write nothing.
        wait: print the log until the job ends; not for an array.

    Raises:
        UserError: a run has a job already, its input is missing, or the cluster refuses; nothing was submitted.
    """
    first = members[0]
    if wait and first.task is not None:
        raise UserError(
            "--follow shows one log, and an array has several: leave it out, and see gpc-dist jobs"
        )
    partition = resources.check(slurm.partitions())
    for member in members:
        _check(member)
    script = shipped_folder("slurm") / f"{what}.sbatch"
    log = _template(members) / "job" / ("%A.log" if first.task is not None else "%j.log")
    options = replace(resources, partition=partition.name).options() + _naming(members, log)
    arguments = [str(log.with_name(_GIVEN[what]))]
    if first.task is not None:
        arguments += ["--tracking.group", str(first.config.tracking.group)]
    slurm.try_out(options, script, arguments)
    if dry_run:
        words = ["sbatch", *options, str(script), *arguments]
        print(f"{shlex.join(words)}\n\n# {script}\n{script.read_text(encoding='utf-8')}")
        return EXIT_DONE
    for member in members:
        _snapshot(member, script)
    script = first.folder.job / script.name
    words = ["sbatch", *options, str(script), *arguments]
    job = slurm.submit(options, script, arguments)
    code = git_revision(Path.cwd())
    for member in members:
        number, path = job, str(log).replace("%j", job).replace("%A", job)
        if member.task is not None:
            number, path = f"{job}_{member.task}", path.replace(TASK, str(member.task))
        record = JobRecord(
            job_id=number,
            log=path,
            submitted_s=time.time(),
            command=list(command),
            sbatch=words,
            code=code,
        )
        write_record(member.folder, record)
        print(f"job {number}: {member.folder}\n  log: {path}")
    if first.config.tracking.enabled:
        print(f"compare runs: {ui_command(tracking_uri(first.config.tracking, first.folder.path))}")
    print(f"see gpc-dist jobs; end with: gpc-dist cancel {job}")
    return follow(first.folder, job) if wait else EXIT_DONE


def _naming(members: Sequence[Member], log: Path) -> list[str]:
    """Options of sbatch for the job's name, log and array."""
    first = members[0]
    if first.task is None:
        return [f"--job-name=gpc-{first.name}", f"--output={log}"]
    return [
        f"--job-name=gpc-{first.config.tracking.group}",
        f"--output={str(log).replace(TASK, '%a')}",
        f"--array={','.join(str(member.task) for member in members)}",
    ]


def _check(member: Member) -> None:
    """Raise `UserError` for one that has a job, whose folder is not its own, or whose input is not there."""
    # late, because they bring torch
    from gpc_dist.encoder.frozen import encoder_path
    from gpc_dist.tasks import make_task

    folder = member.folder
    folder.check_own()
    encoder_path(member.config.encoder)
    make_task(member.config.task, member.config.data)
    if data := member.config.data.path:
        local = data.startswith(("/", ".", "~"))
        if local and not Path(data).exists():
            raise UserError(f"data.path {data} does not exist")
    other = job_id(folder)
    if other is not None and (job := slurm.jobs([other]).get(other)) and not job.ended:
        raise UserError(
            f"{folder} has job {other}, which is {job.state}: end it with gpc-dist cancel {other}, or give this "
            "one another name"
        )


def _template(members: Sequence[Member]) -> Path:
    """The members' folder with `{task}` in place of the task's number."""
    path = members[0].folder.path
    if members[0].task is None:
        return path
    name = re.sub(rf"{members[0].task}$", TASK, path.name)
    return path.with_name(name)


def _snapshot(member: Member, script: Path) -> None:
    """Copy the configuration and the scripts to `job/`: they may change before the job starts."""
    for name, text in member.kept.items():
        files.write_text(member.folder.job / name, text)
    for source in (script, script.with_name(SHARED)):
        shutil.copyfile(source, member.folder.job / source.name)
