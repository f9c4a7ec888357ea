"""Log lines, each with its time and rank: of rank 0 on standard error, of every other rank in a file of its own.

What a command was asked for (tables, JSON, where things are) goes to standard output and is not logged.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from pathlib import Path

from gpc_dist.shown import shown_lines

_LOGGER = logging.getLogger("gpc_dist")
_FORMAT = "%(asctime)s rank %(rank)s %(levelname)s %(message)s"


def configure(verbosity: int) -> None:
    """Log to standard error, on rank 0 and in processes that are no rank.

    Args:
        verbosity: 1 or more for details, 0 for what a user follows a run by, below 0 for warnings and errors only.
    """
    for handler in _LOGGER.handlers[:]:
        _LOGGER.removeHandler(handler)
    _LOGGER.setLevel(logging.INFO if verbosity == 0 else logging.DEBUG if verbosity > 0 else logging.WARNING)
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(lambda _: _rank() == "0")
    _add(handler)


def log_rank_to(file: Path) -> None:
    """Log everything of this rank, which is above 0, to a file, and the stacks of its threads if a signal such as
    SIGABRT (a collective that timed out) or SIGSEGV ends the process."""
    file.parent.mkdir(parents=True, exist_ok=True)
    stream = file.open("a", encoding="utf-8")
    _add(logging.StreamHandler(stream))
    _LOGGER.setLevel(logging.DEBUG)
    faulthandler.enable(stream)


class _Formatter(logging.Formatter):
    """Lets no name or reason in a message steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return shown_lines(super().format(record))


def _add(handler: logging.Handler) -> None:
    handler.setFormatter(_Formatter(_FORMAT))
    handler.addFilter(_note_rank)
    _LOGGER.addHandler(handler)


def _note_rank(record: logging.LogRecord) -> bool:
    record.rank = _rank()
    return True


def _rank() -> str:
    return os.environ.get("RANK", "0")
