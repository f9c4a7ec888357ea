"""Follow a job: print its log until it ends."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from gpc_dist.cluster import slurm
from gpc_dist.cluster.job_record import read_record
from gpc_dist.errors import EXIT_DONE, EXIT_ENVIRONMENT
from gpc_dist.runs.folder import RunFolder

log = logging.getLogger(__name__)

_PERIOD_S = 2.0


def follow(folder: RunFolder, job_id: str) -> int:
    """Print a job's log as it grows, over all starts of the job; Ctrl-C does not end the job.

    Returns:
        The exit code: 0 if the run finished.
    """
    record = read_record(folder)
    assert record is not None
    offset, said = 0, ""
    while True:
        job = slurm.jobs([job_id]).get(job_id)
        offset = _print_from(Path(record.log), offset)
        if job is None or job.ended:
            break
        state = f"job {job_id}: {job.state}" + (f" ({job.reason})" if job.state == "PENDING" else "")
        if state != said:
            log.info(state)
            said = state
        time.sleep(_PERIOD_S)
    status = folder.read_status()
    log.info("job %s: %s; run %s %s", job_id, job.state if job else "gone", status.state, status.reason)
    return EXIT_DONE if status.state == "finished" else EXIT_ENVIRONMENT


def _print_from(log: Path, offset: int) -> int:
    if not log.exists():
        return offset
    with log.open("rb") as file:
        file.seek(offset)
        new = file.read()
    sys.stdout.write(new.decode(errors="replace"))
    sys.stdout.flush()
    return offset + len(new)
