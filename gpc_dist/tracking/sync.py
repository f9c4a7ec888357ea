"""`gpc-dist sync`: bring MLflow up to date with the folder of a run or search, without an exporter process."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from gpc_dist.errors import MachineError, UserError
from gpc_dist.runs.facts import redact
from gpc_dist.runs.folder import RunFolder, SearchFolder, Status, TrialFolder
from gpc_dist.tracking.exporter import Exporter
from gpc_dist.tracking.run_exporter import RunExporter
from gpc_dist.tracking.search_exporter import SearchExporter
from gpc_dist.tracking.state import ExportState

# A exporter gives a sign of life every few seconds. Silence for this long means that its machine is
# gone, whatever clocks that disagree and slow network file systems add.
_SILENCE_S = 600.0


def sync(place: Path | str, uri: str | None = None) -> ExportState:
    """`sync_search` for the folder of a search, `sync_run` for any other."""
    return (sync_search if SearchFolder(place).config.exists() else sync_run)(place, uri)


def sync_run(run_dir: Path | str, uri: str | None = None) -> ExportState:
    """Send MLflow what it does not hold yet of a run; a run that died is marked as killed first.

    Args:
        run_dir: the run folder.
        uri: tracking store; the one of the run's configuration when not given. A store that has
            not held the run before gets all of it, under a new run id.

    Raises:
        UserError: this is not the folder of a run of its own, or its exporter is still at work.
        MachineError: the tracking store cannot be reached or refuses.
    """
    folder = RunFolder(run_dir)
    if TrialFolder(run_dir).trial.exists():
        search_dir = folder.path.parent.parent
        raise UserError(f"{folder} is a trial of a search: gpc-dist sync {search_dir} records it")
    return _sync(folder, lambda: RunExporter(folder, uri))


def sync_search(search_dir: Path | str, uri: str | None = None) -> ExportState:
    """`sync_run` for a search and its trials.

    Raises:
        UserError: this is not the folder of a search, or its exporter is still at work, or a file
            of a trial is broken.
        MachineError: the tracking store cannot be reached or refuses.
    """
    folder = SearchFolder(search_dir)
    return _sync(folder, lambda: SearchExporter(folder, uri))


def _sync(folder: RunFolder, open_exporter: Callable[[], Exporter]) -> ExportState:
    folder.read_config()  # fails before anything is written into what is no such folder
    with folder.hold_tracking():
        _mark_if_gone(folder)
        exporter = open_exporter()
        try:
            exporter.update()
        except UserError:
            raise
        except Exception as error:  # database, HTTP and artifact stores all have their own
            raise MachineError(
                f"MLflow at {redact(exporter.uri)} did not take the {folder.kind} {folder}: "
                f"{redact(str(error))}\n"
                "Run the command again when the store can be reached; nothing is recorded twice."
            ) from error
        exporter.state.error = None
        exporter.state.save(folder)
        return exporter.state


def mark_stale(run_dir: Path | str) -> bool:
    """Write the state `killed` into a folder whose trainer ended without a word.

    Needed only where the exporter was ended with its trainer (a lost node, the end of a Slurm
    job); otherwise it has done so. `sync_run` then tells MLflow.

    Returns:
        Whether the run was such a one.

    Raises:
        UserError: this is not the folder of a run.
    """
    folder = RunFolder(run_dir)
    folder.read_config()
    try:
        with folder.hold_tracking():
            return _mark_if_gone(folder)
    except UserError:  # its exporter is at work
        return False


def _mark_if_gone(folder: RunFolder) -> bool:
    status = folder.read_status()
    gone = status.state == "running" and _trainer_is_gone(folder, status)
    if gone:
        folder.mark_killed("found without its process")
    return gone


def _trainer_is_gone(folder: RunFolder, status: Status) -> bool:
    if not folder.status.exists():
        return False  # about to start
    if status.host != socket.gethostname():
        return time.time() - folder.last_sign_of_life_s() > _SILENCE_S
    try:
        process = psutil.Process(status.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        # a process that began later than the run has only inherited the number
        return bool(process.create_time() > status.started_s)
    except psutil.NoSuchProcess:
        return True
