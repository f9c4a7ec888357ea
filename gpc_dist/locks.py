"""Locks between processes, as files, on any file system.

`filelock` would do, but on a file system without `flock` it falls back to a file that outlives its process, or raises.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpc_dist import files

log = logging.getLogger(__name__)

_TAKEN = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_POLL_S = 0.05


class TakenError(Exception):
    """Another process holds the lock."""


@contextmanager
def hold(path: Path, timeout_s: float | None = None) -> Iterator[None]:
    """Hold the lock of a file while the block runs; the folder of the file is made where it is missing.

    The kernel releases the lock when its process ends, however it ends. On a file system without locks the block
    runs all the same, and a warning says so.

    Args:
        timeout_s: seconds to wait for another holder; without end when not given.

    Raises:
        TakenError: another process still holds the lock.
    """
    files.make_folder(path.parent)
    end_s = None if timeout_s is None else time.monotonic() + timeout_s
    with path.open("a") as file:  # closing it releases the lock
        while not _taken_up(file.fileno(), path):
            if end_s is not None and time.monotonic() >= end_s:
                raise TakenError
            time.sleep(_POLL_S)
        yield


def is_free(path: Path) -> bool:
    """Whether nobody holds the lock of a file that is there; False where that cannot be told."""
    try:
        with path.open("r") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _taken_up(handle: int, path: Path) -> bool:
    """Whether this process may go on: it has the lock, or there are none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        if error.errno not in _NO_LOCKS:
            raise
        log.warning(
            "%s: this file system has no locks (%s), so two processes that write there at once are not noticed",
            path.parent,
            error.strerror,
        )
    return True
