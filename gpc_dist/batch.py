"""What a batch script is told of a start of its job, where it asks: in files that it names (see `slurm/job.sh`)."""

from __future__ import annotations

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


def note_refusal(reason: str) -> None:
    """The job must not be tried again: it would fail for the same reason."""
    _note("GPC_DIST_REFUSAL", reason)


def note_idle() -> None:
    """This start was stopped before it got anywhere: several of them in a row are the end of the job."""
    _note("GPC_DIST_IDLE", "stopped before it got anywhere")


def _note(variable: str, text: str) -> None:
    if not (file := os.environ.get(variable)):
        return
    try:
        Path(file).write_text(text + "\n", encoding="utf-8")
    except OSError as error:  # a folder of another node, or one that a container does not have
        log.debug("cannot write %s: %s", file, error.strerror)
