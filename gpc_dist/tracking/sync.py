"""`gpc-dist sync`: bring MLflow up to date with the folder of a run or search, without an exporter process."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil

from gpc_dist.errors import MachineError, UserError
from gpc_dist.runs.folder import RunFolder, SearchFolder, Status, TrialFolder
from gpc_dist.shown import redact
from gpc_dist.tracking.exporter import Exporter
from gpc_dist.tracking.run_exporter import RunExporter
from gpc_dist.tracking.search_exporter import SearchExporter
from gpc_dist.tracking.state import ExportState

log = logging.getLogger(__name__)

# An exporter writes a heartbeat every few seconds. Without one for this long, its machine counts as
# gone, even if clocks differ and the network file system is slow.
_SILENCE_S = 600.0

_EXPORTER_S = 120.0
"""How long to wait for the exporter of a run that has ended."""


def sync(place: Path | str, uri: str | None = None) -> ExportState:
    """Call `sync_search` for the folder of a search, `sync_run` for any other."""
    return (sync_search if SearchFolder(place).config.exists() else sync_run)(place, uri)


def sync_run(run_dir: Path | str, uri: str | None = None) -> ExportState:
    """Send the part of a run that MLflow does not hold yet; a run whose process is gone is first marked as killed.

    Args:
        run_dir: the run folder.
        uri: tracking store; that of the run's configuration when not given. A store other than that
            of the last export gets the whole run, under a new run id.

    Raises:
        UserError: the folder is not a run folder, or is a trial's, or its exporter is still running.
        MachineError: the tracking store cannot be reached or refuses.
    """
    folder = RunFolder(run_dir)
    if TrialFolder(run_dir).trial.exists():
        search_dir = folder.path.parent.parent
        raise UserError(f"{folder} is a trial of a search: gpc-dist sync {search_dir} records it")
    return _sync(folder, lambda: RunExporter(folder, uri))


def sync_search(search_dir: Path | str, uri: str | None = None) -> ExportState:
    """Do what `sync_run` does for a search and its trials.

    Raises:
        UserError: the folder is not a search's folder, or its exporter is still running, or a file
            of a trial is broken.
        MachineError: the tracking store cannot be reached or refuses.
    """
    folder = SearchFolder(search_dir)
    return _sync(folder, lambda: SearchExporter(folder, uri))


def _sync(folder: RunFolder, open_exporter: Callable[[], Exporter]) -> ExportState:
    folder.read_config()  # fails before anything is written into a wrong folder
    with ExitStack() as held:
        _hold_tracking(folder, held)
        _mark_if_gone(folder)
        exporter = open_exporter()
        try:
            exporter.update()
        except UserError:
            raise
        except Exception as error:  # database, HTTP and artifact stores raise errors of their own
            raise MachineError(
                f"MLflow at {redact(exporter.uri)} did not take the {folder.kind} {folder}: "
                f"{redact(str(error))}\n"
                "Run the command again when the store can be reached; nothing is recorded twice."
            ) from error
        exporter.state.error = None
        exporter.state.save(folder)
        return exporter.state


def _hold_tracking(folder: RunFolder, held: ExitStack) -> None:
    try:
        held.enter_context(folder.hold_tracking())
    except UserError:
        if folder.read_status().state == "running":
            raise
        # the exporter of a run that has ended sends what is left
        log.info("%s is still being recorded by its exporter: waiting for it", folder)
        held.enter_context(folder.hold_tracking(_EXPORTER_S))


def mark_stale(run_dir: Path | str) -> bool:
    """Write the state `killed` into a folder whose trainer ended without writing an end state.

    Needed only if the exporter was ended with its trainer (a lost node, the end of a Slurm job);
    otherwise the exporter has written it. `sync_run` then sends it to MLflow.

    Returns:
        Whether the state was written.

    Raises:
        UserError: the folder is not a run folder.
    """
    folder = RunFolder(run_dir)
    folder.read_config()
    try:
        with folder.hold_tracking():
            return _mark_if_gone(folder)
    except UserError:  # its exporter is running
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
        # a process that began after the run has only reused its id
        return bool(process.create_time() > status.started_s)
    except psutil.NoSuchProcess:
        return True
