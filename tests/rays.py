"""Ray on this machine, for searches that need no cluster of their own, and the processes that work for a search."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.processes import TIMEOUT_S, Started, free_port, wait_until

_CLIENT = """
import sys
import ray
from ray._raylet import GcsClient

for enter in (lambda: GcsClient(address=sys.argv[1]).internal_kv_keys(b""), lambda: ray.init(address=sys.argv[1])):
    try:
        enter()
        print("entered")
    except Exception as error:
        print(type(error).__name__)
"""


@contextmanager
def ray_cluster(asks: bool = True) -> Iterator[dict[str, str]]:
    """A Ray cluster with this machine's cores, which ends with the block: environment variables that lead to it.

    Args:
        asks: whether it answers only those who know its token; one that does not gets no cores either.
    """
    port = free_port()
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    secret = secret if asks else {"RAY_AUTH_MODE": "disabled"}
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        words = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
        words += ["--node-ip-address=127.0.0.1", f"--temp-dir={folder}", "--include-dashboard=false"]
        words += [
            "--disable-usage-stats",
            "--include-log-monitor=false",
            "--min-worker-port=0",
            "--max-worker-port=0",
            *([] if asks else ["--num-cpus=0"]),
        ]
        ray = subprocess.Popen(
            words,
            env=os.environ | secret,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_until(lambda: _answers(port))
            yield secret | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        finally:
            ray.terminate()
            ray.wait()
            with suppress(ProcessLookupError):
                os.killpg(ray.pid, signal.SIGKILL)


def kill_search(driver: Started, place: Path) -> None:
    """End a search that was started in this folder with all its processes, as the loss of its machine would."""
    driver.kill()
    driver.wait()
    for worker in workers_in(place):  # which would look for their cluster for a minute
        worker.kill()
    wait_until(lambda: not workers_in(place))


def workers_in(place: Path, kind: str = "ray::") -> list[psutil.Process]:
    """Ray's workers that work in this folder, as those of a search do where it was started.

    Args:
        kind: what their names begin with: `ray::Rank` for the ranks of packs.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if " ".join(process.cmdline()).startswith(kind) and process.cwd() == str(place):
                found.append(process)
    return found


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def refused_without_the_token(driver: int, home: Path) -> None:
    """Assert that nobody enters the Ray that a search has of its own but the search.

    As any process of this machine: the cluster's store is asked, and a driver tries to enter.

    Args:
        home: of these processes.
    """
    (store,) = [
        each for each in psutil.Process(driver).children(recursive=True) if each.name() == "gcs_server"
    ]
    port = min(each.laddr.port for each in store.net_connections() if each.status == psutil.CONN_LISTEN)
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    without |= {"HOME": str(home), "RAY_NUM_REDIS_GET_RETRIES": "1"}
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    clients = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", _CLIENT, f"127.0.0.1:{port}"],
            env=without | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for more in ({}, wrong)
    ]
    said = [client.communicate(timeout=TIMEOUT_S)[0].split() for client in clients]
    assert said == [["AuthenticationError", "ConnectionError"]] * 2
