"""Folders that nobody else can have made, fill or enter, on machines where many users share one for temporary files."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

_INDUCTOR = {"TORCHINDUCTOR_CACHE_DIR": "inductor"}
"""By default in the folder for temporary files, under a name that anybody can take first."""
_IN_HOME = {"TORCH_EXTENSIONS_DIR": "extensions", "TRITON_CACHE_DIR": "triton"}
"""By default in the home folder, which the nodes of a job share: there parallel builds disturb each other."""


def make(folder: Path) -> bool:
    """Make a folder that only this user can enter; False where something else stands there.

    One that was made so before will do. Who can change the folder above it is trusted, as everybody is kept from
    replacing what is another's in the one for temporary files.
    """
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()  # of a link itself, not of what it leads to
        own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
        return own and not stat.S_IMODE(found.st_mode) & 0o077
    return True


def temporary(place: str | Path | None = None) -> Path:
    """A new folder that only this user can enter, and that goes with this process.

    Args:
        place: the folder that it is to be in; by default the one for temporary files.
    """
    folder = tempfile.mkdtemp(prefix="gpc-dist-", dir=place)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def name_caches() -> None:
    """Name folders for the code that libraries compile, and run, in the environment of this process and of those that
    it starts, where they are not named yet."""
    wanted = _INDUCTOR | (_IN_HOME if "SLURM_JOB_ID" in os.environ else {})
    if missing := wanted.keys() - os.environ.keys():
        folder = _cache()
        os.environ.update({name: str(folder / wanted[name]) for name in missing})


def _cache() -> Path:
    """The folder that this user's processes share on this machine, from job to job, or one of this process alone."""
    shared = Path(tempfile.gettempdir()) / f"gpc-dist-cache-{os.geteuid()}"
    if make(shared):
        return shared
    log.warning(
        "%s is not a folder of yours that nobody else can enter: what is compiled is kept for this process only",
        shared,
    )
    return temporary()
