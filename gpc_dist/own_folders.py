"""Folders that nobody else can have made, fill or enter, on machines where many users share one for temporary files."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import stat
import tempfile
from functools import cache
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
        return is_own(folder)
    return True


def is_own(folder: Path) -> bool:
    """Whether this is a folder that only this user can enter."""
    try:
        found = folder.lstat()  # of a link itself, not of what it leads to
    except OSError:
        return False
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return own and not stat.S_IMODE(found.st_mode) & 0o077


def temporary(place: str | Path | None = None) -> Path:
    """A new folder that only this user can enter, and that goes with this process.

    Args:
        place: the folder that it is to be in; by default the one for temporary files.
    """
    folder = tempfile.mkdtemp(prefix="gpc-dist-", dir=place)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def keep_compiled_code() -> None:
    """From here on let libraries keep the code that they compile, and run, where nobody else could have put any.

    Call it before something is compiled. Folders that the user has named stay.
    """
    folder = on_this_machine() or temporary()
    for name, own in (_INDUCTOR | (_IN_HOME if "SLURM_JOB_ID" in os.environ else {})).items():
        # torch puts its choice into the environment when it is imported
        if not (given := os.environ.get(name)) or Path(given).name.startswith("torchinductor_"):
            os.environ[name] = str(folder / own)
    # inductor keeps a part in the folder for temporary files, whatever it is told
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


def on_this_machine() -> Path | None:
    """The folder that this user's processes share on this machine, from job to job; None if others might enter it."""
    name, place = f"gpc-dist-cache-{os.geteuid()}", Path(tempfile.gettempdir())
    # it is what processes that keep compiled code have for temporary files
    shared = place if place.name == name else place / name
    if make(shared):
        return shared
    log.warning("%s is not a folder of yours that nobody else can enter: nothing is cached there", shared)
    return None
