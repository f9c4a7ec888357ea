"""Commands of the program in processes of their own that start in milliseconds.

Importing torch, transformers and DeepSpeed takes seconds in every process. Here a server that has imported them once
(`multiprocessing`'s forkserver) forks each process: a new one, with its own environment, working folder and output.
What only a start from nothing can show (`python -m gpc_dist`, and that a launcher's ranks find all they need) is tested
with `cold_command`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gpc_dist import cli
from gpc_dist.distributed import launch

TIMEOUT_S = 300
"""Longest wait for a process or for what it does: the limit of a test that hangs, not a claim about speed."""

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.preloaded"])


class Started:
    """A call that runs in a process of its own; attributes as of `subprocess.Popen` and `CompletedProcess`."""

    def __init__(
        self,
        call: Callable[..., Any],
        arguments: Sequence[Any],
        cwd: Path | None,
        environment: Mapping[str, str],
    ):
        self._output = tempfile.TemporaryDirectory()
        files = [f"{self._output.name}/{name}" for name in ("stdout", "stderr")]
        for file in files:
            Path(file).touch()
        place, whole = str(cwd or Path.cwd()), {**os.environ, **environment}
        self._process = _server.Process(target=_run, args=(call, arguments, place, whole, *files))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, -n after signal n; None while it runs."""
        return self._process.exitcode

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return Path(self._output.name, "stdout").read_text()

    @property
    def stderr(self) -> str:
        return Path(self._output.name, "stderr").read_text()

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        self._process.join(TIMEOUT_S)
        assert self.returncode is not None, self.stdout + self.stderr
        return self.returncode


def start_call(
    call: Callable[..., Any], *arguments: Any, cwd: Path | None = None, **environment: str
) -> Started:
    """Start a function of some module."""
    return Started(call, arguments, cwd, environment)


def start(*words: object, cwd: Path | None = None, **environment: str) -> Started:
    """Start `gpc-dist`."""
    return Started(cli.main, [[str(word) for word in words]], cwd, environment)


def command(*words: object, cwd: Path | None = None, **environment: str) -> Started:
    """Run `gpc-dist`."""
    started = start(*words, cwd=cwd, **environment)
    started.wait()
    return started


def start_launcher(*words: object) -> Started:
    """Start `gpc-dist` with `engine.ranks`: it starts these ranks itself, but forks them."""
    return start_call(_launch, [str(word) for word in words])


def _launch(words: list[str]) -> int:
    calls = {name: getattr(subprocess, name) for name in ("DEVNULL", "TimeoutExpired")}
    launch.subprocess = SimpleNamespace(Popen=_ForkedRank, **calls)
    return cli.main(words)


class _ForkedRank(ForkProcess):
    """What a launcher uses of `subprocess.Popen`, for a command of the program that this process runs a fork of."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdout: int | None,
        stderr: Any,
        start_new_session: bool,
        preexec_fn: Callable[[], None],
    ):
        words = list(command[command.index("gpc_dist") + 1 :])
        super().__init__(target=self._begin, args=(words, env, stdout, stderr, start_new_session, preexec_fn))
        self.start()

    @staticmethod
    def _begin(
        words: list[str], env: Mapping[str, str], stdout: int | None, stderr: Any, alone: bool, before: Any
    ) -> None:
        if alone:
            os.setsid()
        for number, file in enumerate((stdout, stderr), start=1):
            if file is not None:
                to = os.open(os.devnull, os.O_WRONLY) if file == subprocess.DEVNULL else file.fileno()
                os.dup2(to, number)
        before()
        os.environ.clear()
        os.environ.update(env)
        sys.exit(cli.main(words))

    @property
    def returncode(self) -> int | None:
        return self.exitcode

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float | None = None) -> None:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.name, timeout or 0)

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def on_ranks(ranks: int, *words: object) -> subprocess.CompletedProcess[str]:
    """Run `gpc-dist` on ranks; see `call_on_ranks`."""
    return call_on_ranks(ranks, cli.main, [str(word) for word in words])


def start_on_ranks(ranks: int, call: Callable[..., Any], *arguments: Any) -> list[Started]:
    """Call a function on ranks that are started as `torchrun` does; alone, without its variables, on one rank."""
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return [
        Started(
            call, arguments, None, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        )
        for rank in range(ranks)
    ]


def call_on_ranks(ranks: int, call: Callable[..., Any], *arguments: Any) -> subprocess.CompletedProcess[str]:
    """Call a function on ranks; see `start_on_ranks`.

    Returns:
        Exit code of the first rank that failed, or 0; what rank 0 printed; and what all ranks said of errors.
    """
    started = start_on_ranks(ranks, call, *arguments)
    wait_until(lambda: any(each.returncode for each in started) or not _running(started))
    if _running(started):  # they wait for the one that failed, or fail for the same reason
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not _running(started), timeout_s=5)
        for each in _running(started):
            each.kill()
    codes = [each.wait() for each in started]
    failed = next((code for code in codes if code), 0)
    said = "".join(each.stderr for each in started)
    return subprocess.CompletedProcess([call, *arguments], failed, started[0].stdout, said)


def _running(started: list[Started]) -> list[Started]:
    return [each for each in started if each.returncode is None]


def _run(
    call: Callable[..., Any],
    arguments: Sequence[Any],
    cwd: str,
    environment: dict[str, str],
    out: str,
    err: str,
) -> None:
    """In the forked process: what a new interpreter would do."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate((out, err), start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    code = call(*arguments)
    sys.exit(code if isinstance(code, int) else 0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cold_start(*words: object, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    """Start `python -m gpc_dist` from nothing."""
    return subprocess.Popen(
        [sys.executable, "-m", "gpc_dist", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
    )


def cold_command(
    *words: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python -m gpc_dist` from nothing."""
    process = cold_start(*words, cwd=cwd, **environment)
    out, said = process.communicate(timeout=TIMEOUT_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, said)


def wait_until(
    ready: Callable[[], object], timeout_s: float = TIMEOUT_S, failed: Callable[[], str] = str
) -> None:
    """Wait for something that will come.

    Args:
        failed: what to say should it not.
    """
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, failed() or "it did not happen in time"
        time.sleep(0.02)
