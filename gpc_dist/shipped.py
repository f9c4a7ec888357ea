"""Folders that ship with the package for users to copy and edit (`gpc-dist init`)."""

from __future__ import annotations

from pathlib import Path

from gpc_dist.errors import MachineError

SHIPPED = ("ds_configs", "recipes", "slurm", "tune")


def shipped_folder(name: str) -> Path:
    """Where a shipped folder lies: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise MachineError(f"the installation lacks its folder {name}: install gpc-dist again")
