"""Folders that ship with the package for users to copy and edit (`gpc-dist init`)."""

from __future__ import annotations

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


def yaml_names(folder: Path) -> list[str]:
    """Names of the YAML files in a packaged folder, sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def yaml_file(kind: str, given: str, folder: Path) -> Path:
    """The YAML file that a user means: a path, or the name of one in a packaged folder.

    Args:
        kind: what to call it in errors.

    Raises:
        UserError: there is none.
    """
    path = Path(given)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"{kind} file {path} does not exist")
        return path
    if given in yaml_names(folder):
        return folder / f"{given}.yaml"
    raise UserError(f"no {kind} '{given}': give a YAML file or one of {', '.join(yaml_names(folder))}")
