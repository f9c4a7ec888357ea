"""The zip file that SuperGLUE's site takes: a file of predictions for each task."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

from gpc_dist.errors import UserError
from gpc_dist.tasks.packaged import answered_by

LINES = {
    "boolq": 3245,
    "cb": 250,
    "copa": 500,
    "multirc": 166,
    "record": 10_000,
    "rte": 3000,
    "wic": 1400,
    "wsc": 146,
    "axb": 1104,
    "axg": 356,
}
"""Lines that the benchmark asks for, by task: one for each test row, of MultiRC for each passage."""
TRAINED = tuple(task for task in LINES if answered_by(task) is None)
_MARK = b"written by gpc-dist submission"
"""Comment of a zip file that is this program's own."""


def check_replaceable(output: Path) -> None:
    """Refuse an output that is no submission of this program.

    Raises:
        UserError: says so.
    """
    if output.suffix != ".zip":
        raise UserError(f"--output {output}: the benchmark takes a zip file, give {output}.zip")
    if not output.exists():
        return
    try:
        with zipfile.ZipFile(output) as archive:
            own = archive.comment == _MARK
    except (OSError, zipfile.BadZipFile):
        own = False
    if not own:
        raise UserError(
            f"--output {output} is there already, and no submission that gpc-dist wrote: give another name, or move it"
        )


def packed(texts: Mapping[str, str]) -> bytes:
    """A zip file of texts by name, the same for the same texts."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.comment = _MARK
        for name, text in texts.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = 0o644 << 16  # else unpacked files have no rights at all
            archive.writestr(member, text, zipfile.ZIP_DEFLATED)
    return content.getvalue()
