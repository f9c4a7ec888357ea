"""The exporter process: exports a folder to MLflow at low priority during the run or search.

The trainer calls `start` and, at the end, `ExporterProcess.finish`. The two processes share the run folder
and a pipe: the trainer holds the writing end and never writes, so the exporter reads an end of file when
the trainer ends for any reason. `spawn` and `follow` are the two sides; a search and its driver use them as
well (`search_exporter`).
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gpc_dist import logs
from gpc_dist.errors import UserError
from gpc_dist.interpreter import python
from gpc_dist.runs.folder import RunFolder
from gpc_dist.shown import redact
from gpc_dist.tracking.exporter import ArtifactError, Exporter
from gpc_dist.tracking.run_exporter import RunExporter
from gpc_dist.tracking.state import ExportState

log = logging.getLogger(__name__)

# Meant for the trainer, which saves its state and ends; the exporter ignores them, to record that end.
_TRAINER_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
_NICENESS = 10
_POLL_S = 0.1
_PERIOD_S = 2.0
_LONGEST_PAUSE_S = 60.0
_GRACE_S = 30.0  # retries of an unreachable store after the trainer's end


class ExporterProcess:
    """The trainer's handle of its exporter process; `spawn` makes it."""

    def __init__(self, folder: RunFolder, process: subprocess.Popen[bytes]) -> None:
        self._folder = folder
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for_run_id(self, timeout_s: float) -> str | None:
        """Wait for the run's id in MLflow; None if `timeout_s` passes or the exporter ends without one."""
        deadline = time.monotonic() + timeout_s
        while True:
            ended = self._process.poll() is not None
            run_id = ExportState.peek(self._folder).run_id
            if run_id or ended or time.monotonic() >= deadline:
                return run_id
            time.sleep(_POLL_S)

    def finish(self, timeout_s: float) -> ExportState:
        """Wait until the exporter has sent the rest; never raises because of MLflow.

        Call it after `result.json` and the end state are written. After `timeout_s` the exporter
        continues alone, and a warning names the command that sends the rest if it is ended as well.
        """
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            problem = f"MLflow has not taken everything within {timeout_s:g} s"
        else:
            problem = "MLflow did not take everything" if self._process.returncode else ""
        state = ExportState.peek(self._folder)
        if problem:
            cause = f" ({state.error})" if state.error else ""
            log.warning("%s%s; complete it with: gpc-dist sync %s", problem, cause, self._folder)
        return state


def start(run_dir: Path | str, delay_s: float = 10.0) -> ExporterProcess | None:
    """Start the exporter of a run whose `config.yaml` and `status.json` are written.

    Call it once per run, from rank 0.

    Args:
        run_dir: the run folder.
        delay_s: seconds for which the exporter waits, so that it does not compete with the start-up
            of the trainer; the first line of metrics ends the wait.

    Returns:
        None if the process could not be started, with a warning that says why.
    """
    return spawn(__name__, RunFolder(run_dir), delay_s)


def spawn(module: str, folder: RunFolder, delay_s: float) -> ExporterProcess | None:
    """Start `python -m module FOLDER DELAY_S PID`, which calls `follow` with this process as the trainer.

    Returns:
        See `start`.
    """
    command = python(module, str(folder), str(delay_s), str(os.getpid()))
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    # Blocked, not ignored: the child inherits the mask through exec, so that a signal to the whole
    # job cannot end the child before it has set its own handlers.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINER_SIGNALS)
    try:
        with folder.tracking_log.open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
    except OSError as error:  # no memory for a process, or no file for its log
        log.warning("no exporter to MLflow (%s); record this later with: gpc-dist sync %s", error, folder)
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    return ExporterProcess(folder, process)


# -- inside the exporter process -------------------------------------------------------------------


def main(run_dir: str, delay_s: float, trainer_pid: int) -> int:
    """Export a run until its trainer ends, then the rest; return the exit code."""
    folder = RunFolder(run_dir)
    return follow(folder, partial(RunExporter, folder), delay_s, trainer_pid)


def follow(folder: RunFolder, open_exporter: Callable[[], Exporter], delay_s: float, trainer_pid: int) -> int:
    """Run an exporter until the process that writes its folder ends, then send the rest.

    Args:
        folder: the folder; its tracking lock is held meanwhile.
        open_exporter: makes the exporter; called again if it raised an exception.
        delay_s: see `start`.
        trainer_pid: the process that called `spawn`.

    Returns:
        The exit code: 0 if MLflow holds everything, or the exporter of a resumed run takes over; else 1.
    """
    os.nice(_NICENESS)
    logs.configure(0)
    for number in _TRAINER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TRAINER_SIGNALS)

    trainer = _Trainer(trainer_pid)
    with folder.hold_tracking(timeout_s=None):  # the exporter before a resume may still be at its end
        _wait_for_metrics(folder, trainer, delay_s)
        attempts = _Attempts(folder, open_exporter)
        attempts.update()
        while not trainer.ended_within(attempts.pause_s):
            folder.sign_of_life()
            attempts.update()
        return _complete(folder, trainer, attempts)


class _Trainer:
    """The process that holds the writing end of standard input."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def ended_within(self, timeout_s: float) -> bool:
        # It never writes, so readable means the end of the file. The parent's id is checked for
        # trainers that leave forked children, which hold the pipe open.
        readable, _, _ = select.select([sys.stdin], [], [], timeout_s)
        return bool(readable) or os.getppid() != self.pid


class _Attempts:
    """Runs the exporter repeatedly, and writes the reason of a failure to `tracking.json` if that can be read."""

    def __init__(self, folder: RunFolder, open_exporter: Callable[[], Exporter]) -> None:
        self._folder = folder
        self._open_exporter = open_exporter
        self._exporter: Exporter | None = None
        self._failures = 0
        self._said: str | None = None

    @property
    def pause_s(self) -> float:
        """Seconds until the next attempt: the usual period, doubled after each failure in a row up to a limit."""
        return min(_PERIOD_S * 2.0**self._failures, _LONGEST_PAUSE_S)

    def update(self) -> bool:
        """Run the exporter once; return whether MLflow now holds everything."""
        error = None
        try:
            if self._exporter is None:
                self._exporter = self._open_exporter()
            self._exporter.update()
            self._failures = 0
        except ArtifactError as caught:
            self._failures = 0
            error = redact(str(caught))
        except Exception as caught:  # no error here may affect training
            self._failures += 1
            error = redact(f"{type(caught).__name__}: {caught}")
        if error is not None and error != self._said:
            log.warning("an attempt failed: %s", error)
        self._said = error
        try:
            state = self._exporter.state if self._exporter else ExportState.load(self._folder)
            if state.error != error:
                state.error = error
                state.save(self._folder)
        except (UserError, OSError) as caught:  # a broken file is left as it is, for its owner to look at
            log.debug("the failure is not noted in the folder: %s", caught)
        return error is None


def _wait_for_metrics(folder: RunFolder, trainer: _Trainer, delay_s: float) -> None:
    deadline = time.monotonic() + delay_s
    before = _size(folder.metrics)
    while time.monotonic() < deadline and _size(folder.metrics) == before:
        if trainer.ended_within(_POLL_S):
            return


def _complete(folder: RunFolder, trainer: _Trainer, attempts: _Attempts) -> int:
    status = folder.read_status()
    if (status.host, status.pid) != (socket.gethostname(), trainer.pid):
        return 0  # resumed already: the next exporter waits for the lock and continues
    if status.state == "running":
        folder.mark_killed(f"the {folder.kind}'s process ended without a word (SIGKILL, out of memory?)")
    deadline = time.monotonic() + _GRACE_S
    while not attempts.update():
        if time.monotonic() + attempts.pause_s > deadline:
            return 1
        time.sleep(attempts.pause_s)
    return 0


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3])))
