"""`gpc-dist submit`: submit a recipe or a search as a job to Slurm."""

from __future__ import annotations

import hashlib
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
from gpc_dist.cluster.options import asked, check_array, check_warning
from gpc_dist.cluster.resources import Resources
from gpc_dist.cluster.snapshot import SHARED, copy_program
from gpc_dist.config import Config
from gpc_dist.errors import EXIT_DONE, UserError
from gpc_dist.runs.facts import git_revision
from gpc_dist.runs.folder import RunFolder
from gpc_dist.shipped import shipped_folder
from gpc_dist.shown import redact
from gpc_dist.tracking.credentials import check_server
from gpc_dist.tracking.store import tracking_uri, ui_command

TASK = "{task}"
"""Placeholder for the number of an array's task; `slurm/train.sbatch` replaces it."""

_GIVEN = {"train": RECIPE, "tune": SEARCH}


@dataclass(frozen=True)
class Member:
    """One run, or one search, of a submission."""

    task: int | None
    """Place in the job array, from 0; None without an array."""
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
    snapshot: bool,
) -> int:
    """Submit one run, an array of runs, or one search; return the exit code.

    Args:
        what: selects the batch script and the file that it gets (`recipe.yaml` or `search.yaml`).
        command: the user's command line, for the record.
        dry_run: print what would be submitted, and write nothing.
        wait: print the log until the job ends; not for an array.
        snapshot: let the job run a copy of this program as it is now.

    Raises:
        UserError: a run has a job already, its input is missing, or the cluster refuses; nothing was submitted.
    """
    first = members[0]
    if wait and first.task is not None:
        raise UserError(
            "--follow shows one log, and an array has several: leave it out, and see gpc-dist jobs"
        )
    partition = resources.check(slurm.partitions())
    script = shipped_folder("slurm") / f"{what}.sbatch"
    options = replace(resources, partition=partition.name).options()
    given = asked(script, options)
    check_warning(given)
    throttle = check_array(given, None if first.task is None else len(members))
    if first.task is not None and (most := slurm.largest_array()) and len(members) > most:
        raise UserError(
            f"{len(members)} runs are more than this cluster takes in one array ({most}: MaxArraySize): submit them in "
            "parts"
        )
    for member in members:
        _check(member)
    if first.task is None:
        options += [f"--job-name=gpc-{first.name}", f"--output={first.folder.job / '%j.log'}"]
        arguments = [str(first.folder.job / _GIVEN[what])]
    else:
        group, links = str(first.config.tracking.group), _links(members)
        options += [f"--job-name=gpc-{group}", f"--output={links / '%a' / '%A.log'}"]
        options += [f"--array=0-{len(members) - 1}{throttle}"]
        arguments = [str(links / TASK / _GIVEN[what]), "--tracking.group", group]
    slurm.try_out(options, script, arguments)
    if dry_run:
        words = ["sbatch", *options, str(script), *arguments]
        print(f"{shlex.join(words)}\n\n# {script}\n{script.read_text(encoding='utf-8')}")
        return EXIT_DONE
    for member in members:
        _keep(member, script)
    if first.task is not None:
        _link(members)
    script = (copy_program(first.folder.job) if snapshot else first.folder.job) / script.name
    words = ["sbatch", *options, str(script), *arguments]
    job = slurm.submit(options, script, arguments)
    code = git_revision(Path.cwd())
    for member in members:
        record = JobRecord(
            job_id=job if member.task is None else f"{job}_{member.task}",
            log=str(member.folder.job / f"{job}.log"),
            submitted_s=time.time(),
            command=[redact(word) for word in command],
            sbatch=[redact(word) for word in words],
            code=code,
        )
        write_record(member.folder, record)
        print(f"job {record.job_id}: {member.folder}\n  log: {record.log}")
    if first.config.tracking.enabled:
        print(f"compare runs: {ui_command(tracking_uri(first.config.tracking.uri, first.folder.path))}")
    print(f"see gpc-dist jobs; end with: gpc-dist cancel {job}")
    return follow(first.folder, job) if wait else EXIT_DONE


def _check(member: Member) -> None:
    """Raise `UserError` for one that has a job, whose folder is not its own, whose input is not there, or whose record
    would take the user's credentials to a server that is not the user's."""
    # late, because they bring torch
    from gpc_dist.encoder.frozen import encoder_path
    from gpc_dist.tasks import make_task

    folder, tracking = member.folder, member.config.tracking
    if tracking.enabled:
        check_server(tracking_uri(tracking.uri, folder.path))
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


def _links(members: Sequence[Member]) -> Path:
    """The folder that leads from the tasks of an array to their members' folders `job/`: a task has only its number.

    Its name depends on the members, since tasks of an earlier array with other members may be waiting still.
    """
    digest = hashlib.sha256("\n".join(str(member.folder) for member in members).encode()).hexdigest()
    return members[0].folder.job / f"array-{digest[:8]}"


def _link(members: Sequence[Member]) -> None:
    links = _links(members)
    links.mkdir(exist_ok=True)
    for member in members:
        link = links / str(member.task)
        if not link.is_symlink():
            link.symlink_to(member.folder.job)


def _keep(member: Member, script: Path) -> None:
    """Copy the configuration and the scripts to `job/`: they may change before the job starts."""
    for name, text in member.kept.items():
        files.write_text(member.folder.job / name, text)
    for source in (script, script.with_name(SHARED)):
        shutil.copyfile(source, member.folder.job / source.name)
