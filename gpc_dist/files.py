"""Files that are whole or absent (atomic writes), and lines of JSON that may be torn at the end."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from gpc_dist.errors import UserError
from gpc_dist.parsing import parse_json

log = logging.getLogger(__name__)

SMALL_BYTES = 8 * 2**20
"""What is read as a whole before it is known to be good, because nobody writes that much: an adapter's card, the state
of a run, an index of weights, a header of tensors. As JSON it can take some twenty times as much memory."""
LARGE_BYTES = 256 * 2**20
"""Of what holds a line for each example of a split."""


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, all to survive a power cut; one that exists stays."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync_folder(folder.parent)


def read_text(path: Path) -> str:
    """The text of a file that a user wrote, without a byte order mark.

    Raises:
        UserError: it is not UTF-8, or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it, for example with iconv"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def open_plain(path: Path) -> BufferedReader:
    """Open a file for reading; it must be one, because a pipe would keep its reader waiting.

    Raises:
        OSError: it is something else, or cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        found = "it is a directory" if stat.S_ISDIR(mode) else "it is no file"
        raise OSError(errno.EINVAL, found, str(path))
    return os.fdopen(handle, "rb")


def read_small_json(path: Path) -> Any:
    """The JSON value in a file of at most `SMALL_BYTES`.

    Raises:
        UserError: it is no JSON, is larger, or cannot be read.
    """
    return parse_json(_content(path, SMALL_BYTES), str(path))


def _content(path: Path, most: int) -> bytes:
    try:
        with open_plain(path) as file:
            content = file.read(most + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if len(content) > most:
        raise UserError(f"{path} is larger than {most // 2**20} MiB")
    return content


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` by `text` (UTF-8) in one step; creates its folder."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """`write_text` for other content than text."""
    make_folder(path.parent)
    _replace(path, content)


def replace_text(path: Path, text: str) -> None:
    """`write_text` where there must be a folder already.

    Raises:
        FileNotFoundError: there is none: it was removed, or moved.
    """
    _replace(path, text.encode())


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # see `_CUT_OFF`
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextmanager
def new_folder(path: Path, names: Collection[str]) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends without an error.

    Every file in it is synced first. A folder that stood at `path` is moved aside, so that at any
    moment either the old or the new one is whole; `recover_folder` puts it back after a crash in between.
    Where `path` is a link, the folder that it leads to is replaced.

    Args:
        names: of the files that this program writes there.

    Raises:
        UserError: see `check_replaceable`.
    """
    path = path.resolve()
    make_folder(path.parent)
    recover_folder(path, names)
    check_replaceable(path, names)
    temporary = _beside(path, _NEW)
    temporary.mkdir()
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # what the umask allows; some writers make private files
        for file in temporary.iterdir():
            file.chmod(mode)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        fsync_folder(temporary)
        replaced = None
        if path.exists():
            replaced = _beside(path, _OLD)
            path.rename(replaced)
        temporary.rename(path)
        fsync_folder(path.parent)
        if replaced:
            remove_folder(replaced, names)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_replaceable(path: Path, names: Collection[str]) -> None:
    """Refuse to replace what this program did not write.

    Raises:
        UserError: `path` is a file, or a folder with other files than these.
    """
    if path.exists() and not path.is_dir():
        raise UserError(
            f"{path} is a file, and a folder is to be written there: move it, or give another folder"
        )
    if others := _others(path, names):
        raise UserError(
            f"{path} holds {few(others)}, which gpc-dist did not write: give another folder, or move what is yours"
        )


def recover_folder(path: Path, names: Collection[str]) -> None:
    """Put back the folder that a `new_folder` cut off between its two renames had moved aside, and remove what
    others left half-written.

    For the one process that writes `path`; a reader must leave the swap to its writer.
    """
    path = path.resolve()
    name = glob.escape(path.name)
    aside = sorted(path.parent.glob(f".{name}.{_OLD}-*"), key=lambda old: old.stat().st_mtime)
    if aside and not path.exists():
        aside.pop().rename(path)
    for left in [*aside, *path.parent.glob(f".{name}.{_NEW}-*")]:
        remove_folder(left, names)


def remove_folder(path: Path, names: Collection[str]) -> None:
    """Remove a folder with files of these names. Others stay, and the folder with them.

    What cannot be removed, because another machine has it open (NFS) say, stays with a warning.
    """
    try:
        remove_cut_off(path, names)
        for name in names:
            (path / name).unlink(missing_ok=True)
        if not _others(path, names):
            path.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("%s could not be removed, and is left there: %s", path, error.strerror)


_CUT_OFF = re.compile(r"\.(.+)\.[0-9a-f]{32}")
"""Names of what a `write_text` leaves that was cut off, after that of its file."""


def remove_cut_off(path: Path, names: Collection[str]) -> None:
    """Remove what a `write_text` of files of these names that was cut off has left in a folder.

    For the one process that writes these files.
    """
    for name in os.listdir(path):
        if is_cut_off(name, names):
            (path / name).unlink(missing_ok=True)


def is_cut_off(name: str, names: Collection[str]) -> bool:
    """Whether a file of this name is what a `write_text` of one of `names` that was cut off has left."""
    match = _CUT_OFF.fullmatch(name)
    return match is not None and match[1] in names


def _others(path: Path, names: Collection[str]) -> list[str]:
    """What is in a folder beside files of these names, beside what was cut off while they were written, and beside what
    NFS keeps of removed ones."""
    if not path.is_dir():
        return []
    return sorted(
        name
        for name in os.listdir(path)
        if not (name in names or is_cut_off(name, names) or name.startswith(".nfs"))
    )


def few(names: Sequence[str]) -> str:
    """The first of these names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


_NEW, _OLD = "new", "replaced"


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{uuid.uuid4().hex}")


def write_json(path: Path, value: Any) -> None:
    """`write_text` for a JSON value, indented. Raises ValueError on NaN and infinities."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal.

    Raises:
        OSError: it is no file, or cannot be read.
    """
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def version(path: Path) -> str:
    """What tells apart the contents a file has had, as far as can be said without reading it; empty
    when it is absent."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return ""
    return f"{found.st_mtime_ns}-{found.st_size}"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, of at most `LARGE_BYTES`; empty when the file is absent.

    Raises:
        UserError: the file is not a JSON object, is larger, or cannot be read.
    """
    if not path.exists():
        return {}
    try:
        value = parse_json(_content(path, LARGE_BYTES), str(path))
    except UserError as error:
        raise UserError(f"{error}: restore or remove it") from None
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
    except (ValueError, RecursionError):  # not JSON, or not UTF-8
        return None
    return value if isinstance(value, dict) else None
