"""`gpc-dist cache`: the caches of text states on this machine, and removing them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from gpc_dist import files
from gpc_dist.encoder.state_cache import INDEX, NAMES, Index, default_root, is_complete, read_index
from gpc_dist.errors import EXIT_DONE, UserError
from gpc_dist.shown import shown

_DAY_S = 86400


@dataclass(frozen=True)
class _Found:
    folder: Path
    index: Index | None
    """None if it cannot be read."""
    used_s: float
    """Unix time of its last use."""


def run_cache(remove: Sequence[str], older_than: float | None) -> int:
    """Show the caches, or remove some of them; returns the exit code.

    Args:
        remove: names of caches; `all` for all of them.
        older_than: remove those that were not used for so many days.

    Raises:
        UserError: a name that no cache has.
    """
    root = default_root()
    found = [_found(path) for path in sorted(root.iterdir()) if is_complete(path)] if root.is_dir() else []
    if not remove and older_than is None:
        print(_table(root, found))
        return EXIT_DONE
    names = {each.folder.name for each in found}
    if unknown := [name for name in remove if name not in names and name != "all"]:
        raise UserError(f"{root} has no cache {unknown[0]}: see gpc-dist cache")
    old_s = time.time() - (older_than or 0) * _DAY_S
    chosen = [
        each
        for each in found
        if each.folder.name in remove or "all" in remove or (older_than is not None and each.used_s < old_s)
    ]
    size = sum(_bytes(each.folder) for each in chosen)
    for each in chosen:
        # without its index it does not count, should anything else not go
        (each.folder / INDEX).unlink(missing_ok=True)
        files.remove_folder(each.folder, NAMES)
    print(f"{len(chosen)} caches removed, {size / 2**20:,.1f} MiB")
    return EXIT_DONE


def _found(folder: Path) -> _Found:
    try:
        index = read_index(folder)
    except UserError:
        index = None
    return _Found(folder, index, (folder / INDEX).stat().st_mtime)


def _bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in NAMES if (folder / name).exists())


def _table(root: Path, found: Sequence[_Found]) -> str:
    if not found:
        return f"no text states are cached in {root}"
    rows = []
    for each in sorted(found, key=lambda each: -each.used_s):
        days = (time.time() - each.used_s) / _DAY_S
        described = ["damaged", "", "", ""]
        if each.index is not None:
            key = each.index.key
            kept = f"{key.dtype}, {key.pooling or 'all tokens'}"
            described = [shown(key.encoder), str(key.first_layer), f"{each.index.rows:,}", kept]
        rows.append(
            [each.folder.name, *described, f"{_bytes(each.folder) / 2**20:,.1f}", f"{days:.1f} days ago"]
        )
    total = sum(_bytes(each.folder) for each in found)
    table = tabulate(
        rows,
        headers=["cache", "encoder", "layer", "rows", "kept", "MiB", "last used"],
        disable_numparse=True,
        colalign=("left", "left", "right", "right", "left", "right", "right"),
    )
    return f"{table}\n{len(found)} caches in {root}, {total / 2**20:,.1f} MiB"
