"""Files that are whole or absent (atomic writes), and lines of JSON that may be torn at the end."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpc_dist.errors import UserError


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` by `text` (UTF-8) in one step; creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends without an error.

    Every file in it is synced first. A folder that stood at `path` is moved aside, so that at any
    moment either the old or the new one is whole; `recover_folder` puts it back after a crash in between.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # some writers make private files; runs are shared
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        fsync_folder(temporary)
        replaced = None
        if path.exists():
            replaced = _aside(path)
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        temporary.rename(path)
        fsync_folder(path.parent)
        if replaced:
            shutil.rmtree(replaced)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def recover_folder(path: Path) -> None:
    """Put back the folder that a `new_folder` cut off between its two renames had moved aside.

    For the one process that writes `path`; a reader must leave the swap to its writer.
    """
    if _aside(path).exists() and not path.exists():
        _aside(path).rename(path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def write_json(path: Path, value: Any) -> None:
    """`write_text` for a JSON value, indented. Raises ValueError on NaN and infinities."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def version(path: Path) -> str:
    """What tells apart the contents a file has had, as far as can be said without reading it; empty
    when it is absent."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return ""
    return f"{stat.st_mtime_ns}-{stat.st_size}"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when the file is absent.

    Raises:
        UserError: the file is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): restore or remove it") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: restore or remove it")
    return value


def read_lines(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of the complete lines from byte `offset` on, and the offset after them.

    A last line without its newline is still being written (or torn by a crash) and is left for the
    next call. Lines that hold no JSON object are skipped: a node that loses power can leave blocks
    of zeros in a file.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    complete = data[: data.rfind(b"\n") + 1]
    records = [record for line in complete.splitlines() if (record := _record(line)) is not None]
    return records, offset + len(complete)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    return value if isinstance(value, dict) else None
