"""Tasks of Slurm jobs that start in milliseconds: forks of a process that has imported the program.

The task that Slurm starts is `task.py` in place of the program (`GPC_DIST_LAUNCHER`). It has the program run by a fork
of the tests' server (`tests.processes`) in the namespaces of its node, with its environment, working folder and output;
it takes on signals, and ends as the fork does. Whatever ends the task ends the fork.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread

from gpc_dist import cli
from tests import processes


class Forks:
    """Answers the tasks of jobs until it is closed.

    Args:
        prepare: what each fork calls before it runs the program.
    """

    def __init__(self, prepare: Callable[[], None]):
        self._prepare = prepare
        self._folder = Path(tempfile.mkdtemp(prefix="forks.", dir="/tmp"))  # Unix sockets want a short path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._folder / "socket"))
        self._listener.listen()
        self._thread = Thread(target=self._answer)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of a job whose tasks are to be forks."""
        task = Path(__file__).with_name("task.py")
        return {
            "GPC_DIST_LAUNCHER": f"{sys.executable} -I -S {task}",
            "TESTS_FORKS": str(self._folder / "socket"),
        }

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        shutil.rmtree(self._folder)

    def _answer(self) -> None:
        while True:
            try:
                task, _ = self._listener.accept()
            except OSError:  # closed
                return
            Thread(target=self._serve, args=(task,)).start()

    def _serve(self, task: socket.socket) -> None:
        """Start the fork of a task, and say how it ended."""
        with task:
            asked = json.loads(task.makefile().readline())
            fork = processes._server.Process(target=_become, args=(self._prepare, *asked))
            fork.start()
            task.sendall(f"{fork.pid}\n".encode())
            if fork.sentinel not in wait([fork.sentinel, task]):
                fork.kill()
            fork.join()
            with suppress(OSError):  # it has ended
                task.sendall(f"{fork.exitcode}\n".encode())


def _become(
    prepare: Callable[[], None], pid: int, words: Sequence[str], cwd: str, environment: dict[str, str]
) -> None:
    """In the fork."""
    multiprocessing.set_start_method(None, force=True)  # as in a process that was started from nothing
    library = ctypes.CDLL(None, use_errno=True)
    for kind in ("mnt", "uts"):
        with open(f"/proc/{pid}/ns/{kind}") as space:
            if library.setns(space.fileno(), 0):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), space.name)
    files = (f"/proc/{pid}/fd/{number}" for number in (1, 2))
    processes._run(_run, (prepare, words), cwd, environment, *files)


def _run(prepare: Callable[[], None], words: Sequence[str]) -> int:
    prepare()
    return cli.main(words)
