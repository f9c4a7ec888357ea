"""A copy of this program for a job: the installed one may change before it runs (`gpc-dist submit --snapshot`)."""

from __future__ import annotations

import hashlib
import shutil
import uuid
from pathlib import Path

import gpc_dist
from gpc_dist.shipped import SHIPPED, shipped_folder

SHARED = "job.sh"
"""File that a batch script sources from its own folder; it takes the program from there too, if there is a copy."""


def copy_program(folder: Path) -> Path:
    """Copy the program and the batch scripts into a folder of their own inside `folder`; return that one.

    Its name depends on its content, which never changes: tasks of an earlier array may run it still.
    """
    sources = _sources()
    digest = hashlib.sha256()
    for name, source in sorted(sources.items()):
        digest.update(f"{name}\n{source.stat().st_size}\n".encode() + source.read_bytes())
    copy = folder / f"code-{digest.hexdigest()[:8]}"
    if not copy.exists():
        temporary = folder / f".{copy.name}.{uuid.uuid4().hex}"
        for name, source in sources.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, temporary / name)
        temporary.rename(copy)
    return copy


def _sources() -> dict[str, Path]:
    """The program's files by their names in a copy, which is laid out as an installed package."""
    package = Path(gpc_dist.__file__).parent
    folders = {"gpc_dist": package} | {f"gpc_dist/{name}": shipped_folder(name) for name in SHIPPED}
    found = {
        f"{place}/{file.relative_to(folder).as_posix()}": file
        for place, folder in folders.items()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    scripts = shipped_folder("slurm")
    return found | {script.name: script for script in (*scripts.glob("*.sbatch"), scripts / SHARED)}
