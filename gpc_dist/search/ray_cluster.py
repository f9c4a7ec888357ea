"""The Ray cluster of a search: the one that RAY_ADDRESS names, or one on this machine that ends with the search."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, chdir, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from gpc_dist import locks, own_folders
from gpc_dist.errors import EXIT_ENVIRONMENT, MachineError
from gpc_dist.runs.folder import SearchFolder
from gpc_dist.search import ray_token
from gpc_dist.search.node import NODES, answers
from gpc_dist.search.trial_files import going_on
from gpc_dist.training.stop import SIGNALS, StopRequest

_OPTIONS: dict[str, Any] = {
    "namespace": "gpc-dist",
    "log_to_driver": False,
    "logging_level": logging.ERROR,
}
_NODES_S = 120.0
_LOST_S = 30.0
"""Half of the time after which Ray gives up."""
_PERIOD_S = 2.0
_POLL_S = 0.02
_PLAIN = re.compile(r"[^:/]+:\d+")
"""An address that `answers` takes."""
_LONGEST_PATH = 22
"""Characters of a folder in which Ray's folder may be: the path of a Unix socket has at most 107, and Ray's own
`/gpc-ray-XXXXXXXX/r/session_<date>_<time>_<microseconds>_<pid>/sockets/plasma_store` takes the others."""
_OWN = "local"
"""Ray's word for a cluster of this process."""
_NEW, _FOLDER, _LOCK = "gpc-new-", "gpc-ray-", ".lock"
"""Beginnings of the names of such a folder, before and after it is locked, and the lock in it."""
_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the newer output cannot be replaced by a reporter of one's own
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # runs have records of their own
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a worker that has lost its Ray would start one of its own
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",  # Ray Tune saves a state that nobody reads: only at the end, as it insists
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # with their stacks; `callback` says them in a line
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of a recipe start at the user's working folder
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # see `training.stop.StopRequest`
}


@contextmanager
def connected(searches: Sequence[SearchFolder], stop: StopRequest) -> Iterator[None]:
    """Connect to the Ray cluster of searches while the block runs.

    Args:
        searches: their folders. Ray puts the current folder on its workers' module path: it is the first of these
            meanwhile, which holds no modules.
        stop: listens on, although Ray sets signal handlers of its own.

    Raises:
        MachineError: nothing answers at RAY_ADDRESS, or not to us; nodes are missing; Ray does not start here; or it
            answers everybody, see `ray_token.check_nodes`.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    with ExitStack() as end:
        options = end.enter_context(entrance())
        address = None if options["address"] == _OWN else options["address"]
        plain = _PLAIN.fullmatch(address or "")
        if plain:  # from here on: Ray would wait for ever to enter a lost one
            end.enter_context(_watched(options["address"], searches))
        # This thread sets signal handlers anew meanwhile: at those of Ray, SIGTERM would end the program at once. The
        # other one stays to the end, because Ray's processes end with the thread that started them.
        thread = end.enter_context(ThreadPoolExecutor(1))
        try:
            with chdir(searches[0].path):
                starting = thread.submit(ray.init, **options, **_OPTIONS)
                while not starting.done():
                    stop.listen(*SIGNALS)
                    wait([starting], timeout=_POLL_S)
            stop.listen(*SIGNALS)
            starting.result()
        except (RayError, RuntimeError, ValueError, OSError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            hint = (
                f"; give the {ray_token.MODE} and {ray_token.TOKEN} that it was started with"
                if address
                else ""
            )
            raise MachineError(f"Ray did not start, or cannot be entered: {reason}{hint}") from None
        if plain is None:
            end.enter_context(_watched(_head(), searches))
        end.callback(ray.shutdown)
        _wait_for_nodes()
        yield


@contextmanager
def entrance() -> Iterator[dict[str, Any]]:
    """Options of `ray.init` for the cluster that RAY_ADDRESS names, or for one of this machine while the block runs.

    Raises:
        MachineError: nothing answers at RAY_ADDRESS; or there is to be no token, see `ray_token.make_token`.
    """
    if address := os.environ.get("RAY_ADDRESS"):
        _check(address)
        yield {"address": address}
    else:
        with _own() as options:
            yield options


def _head() -> str:
    """Address of the head that this process has entered."""
    return str(ray.get_runtime_context().gcs_address)


@contextmanager
def _watched(address: str, searches: Sequence[SearchFolder]) -> Iterator[None]:
    """End this process while the block runs if Ray's head is lost: Ray would end it too, but later, with exit code 1
    and without a word to the user. What Ray began then waits for its head, so nothing of this process is cleaned up."""
    done = threading.Event()

    def watch() -> None:
        answered_s = time.monotonic()
        while not done.wait(_PERIOD_S):
            if answers(address):
                answered_s = time.monotonic()
            elif time.monotonic() - answered_s > _LOST_S:
                reason = (
                    f"the Ray at {address} has not answered for {_LOST_S:.0f} s, so its head was lost: "
                    f"{going_on(searches)}"
                )
                for folder in searches:
                    with suppress(OSError):
                        folder.write_status("failed", reason)
                print(f"gpc-dist: error: {reason}", file=sys.stderr, flush=True)
                os._exit(EXIT_ENVIRONMENT)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _check(address: str) -> None:
    """Raise `MachineError` if nothing answers at RAY_ADDRESS; Ray itself would wait for minutes, or for ever."""
    if _PLAIN.fullmatch(address) and not answers(address):
        raise MachineError(
            f"nothing answers at RAY_ADDRESS {address}: start Ray there, or unset RAY_ADDRESS for a cluster of this "
            "machine's own"
        )


@contextmanager
def _own() -> Iterator[dict[str, Any]]:
    """Options of `ray.init` for a cluster of this machine, which no other search joins and nobody else enters."""
    ray_token.make_token()
    given = tempfile.gettempdir()
    place = given if len(given) <= _LONGEST_PATH else "/tmp"
    _remove_left(Path(place))
    with ExitStack() as end:
        made = Path(tempfile.mkdtemp(prefix=_NEW, dir=place))
        folder = made.with_name(made.name.replace(_NEW, _FOLDER))
        for path in (made, folder):
            end.callback(shutil.rmtree, path, ignore_errors=True)
        end.enter_context(locks.hold(made / _LOCK))
        made.rename(folder)
        yield {
            "address": _OWN,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
            "_temp_dir": f"{folder}/r",  # to which Ray lets everybody write: nobody gets there
        }


def _remove_left(place: Path) -> None:
    """Remove what searches have left that were killed: no process holds the lock there."""
    for folder in place.glob(f"{_FOLDER}*"):
        if own_folders.is_own(folder) and locks.is_free(folder / _LOCK):
            shutil.rmtree(folder, ignore_errors=True)


def _wait_for_nodes() -> None:
    deadline, wanted = time.monotonic() + _NODES_S, int(os.environ.get(NODES, "1"))
    while (count := sum(node["Alive"] for node in ray.nodes())) < wanted:
        if time.monotonic() > deadline:
            raise MachineError(f"{count} of {wanted} nodes joined the Ray cluster within {_NODES_S:.0f} s")
        time.sleep(1.0)
    ray_token.check_nodes(ray.nodes())
