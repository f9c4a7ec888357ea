"""Small files that are either complete or absent: atomic writes and append-only JSON lines."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from gpc_dist.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: a reader sees the old file or the new one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """`write_text` for bytes. Creates the folder; survives a crash of the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_text` for a JSON value, indented. Raises ValueError on NaN and infinities."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


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
