"""Folders that ship with the package for users to copy and edit (`gpc-dist init`)."""

from __future__ import annotations

import shutil
from pathlib import Path

from gpc_dist.errors import MachineError, UserError

SHIPPED = ("ds_configs", "recipes", "slurm", "tune")


def shipped_folder(name: str) -> Path:
    """Where a shipped folder lies: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise MachineError(f"the installation lacks its folder {name}: install gpc-dist again")


def copy_shipped(folder: Path) -> None:
    """Copy every shipped folder into `folder`.

    Raises:
        UserError: one of them is there already; nothing has been copied.
    """
    if present := [name for name in SHIPPED if (folder / name).exists()]:
        raise UserError(f"{folder} already has {', '.join(present)}: move it away, or choose another DIR")
    for name in SHIPPED:
        ignored = shutil.ignore_patterns("__pycache__", "*.py", "demo_data")
        shutil.copytree(shipped_folder(name), folder / name, ignore=ignored)
