"""A disk that keeps, when the power is cut, no more than it has promised.

What POSIX promises is what `fsync` was called for: the content of a file that was synced, and the names in a folder
that was. `cut` takes everything else back that a process has done since `watch`: renames, new folders, and the bytes
of files after the last sync. File systems usually keep more.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any


@dataclass
class Disk:
    """Args:
    root: folder that is looked after.
    aside: a folder beside it for what renames have replaced.
    """

    root: Path
    aside: Path
    _began_ns: int = field(default_factory=time.time_ns)
    _undo: list[tuple[Path, Callable[[], None]]] = field(default_factory=list)
    """Folders whose names have changed since they were synced, and how to take the change back."""
    _synced: dict[tuple[int, int], int] = field(default_factory=dict)
    """Bytes of a file, by device and inode, that were synced."""

    def watch(self) -> None:
        """Follow what this process does from now on."""
        self.aside.mkdir(exist_ok=True)
        for name in ("rename", "replace"):
            self._wrap(name, self._renamed)
        self._wrap("mkdir", self._made)
        fsync = os.fsync

        @wraps(fsync)
        def synced(file: Any) -> None:
            fsync(file)
            self._note_sync(file if isinstance(file, int) else file.fileno())

        os.fsync = synced

    def cut(self) -> None:
        """Take back what was not synced."""
        for _, undo in reversed(self._undo):
            undo()
        for path in self.root.rglob("*"):
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_mtime_ns >= self._began_ns:
                kept = self._synced.get((found.st_dev, found.st_ino), 0)
                if kept < found.st_size:
                    os.truncate(path, kept)

    def _wrap(self, name: str, before: Callable[..., Callable[[], None] | None]) -> None:
        call = getattr(os, name)

        @wraps(call)
        def followed(*arguments: Any, **named: Any) -> Any:
            done = before(*arguments) if self._mine(arguments[0]) else None
            result = call(*arguments, **named)
            if done is not None:
                done()
            return result

        setattr(os, name, followed)

    def _mine(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and Path(path).absolute().is_relative_to(self.root)

    def _renamed(self, source: Any, target: Any) -> Callable[[], None]:
        source, target = Path(source).absolute(), Path(target).absolute()
        before = self.aside / uuid.uuid4().hex
        replaced = target.is_file()
        if replaced:
            os.link(target, before)

        def undo() -> None:
            if target.exists():
                shutil.move(target, source)
            if replaced:
                shutil.move(before, target)

        return lambda: self._undo.append((target.parent, undo))

    def _made(self, path: Any, *_: Any) -> Callable[[], None]:
        path = Path(path).absolute()
        return lambda: self._undo.append((path.parent, lambda: shutil.rmtree(path, ignore_errors=True)))

    def _note_sync(self, file: int) -> None:
        found = os.fstat(file)
        if stat.S_ISDIR(found.st_mode):
            folder = Path(os.readlink(f"/proc/self/fd/{file}"))
            self._undo = [(where, undo) for where, undo in self._undo if where != folder]
        else:
            self._synced[found.st_dev, found.st_ino] = found.st_size
