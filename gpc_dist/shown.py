"""Text for other eyes: without what steers a terminal, and without secrets.

Names, reasons and metrics may come from anybody's files. A terminal takes some of their characters for commands, or
writes them in another order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_STEERING = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"  # control characters, line breaks, halves of characters
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"  # what changes the direction of writing
)
_STEERING_LINES = re.compile(_STEERING.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))

_SECRETS = (
    # user and password of a URI, up to the last `@`: a password may hold `@` and `/`
    (re.compile(r"(?<=://)(?:[^/\s:]*:\S{0,4096}|[^/\s]*)@"), "***@"),
    (
        re.compile(
            r"([?&;][\w.-]*(?:token|password|passwd|pwd|secret|credential|signature|sig|key)=)[^\s&;#'\"]+",
            re.IGNORECASE,
        ),
        r"\1***",
    ),
    (re.compile(r"(?<![\w?&;-])((?:password|passwd|pwd|secret)\s?=\s?)[^\s&;#]+", re.IGNORECASE), r"\1***"),
)
_PASSWORD = re.compile(r"://[^/\s:]*:\S{0,4096}@")


def shown(text: str) -> str:
    r"""`text` as a part of a line, with what steers a terminal as it is written in Python: `\x1b`, `\u202e`; blanks
    stand for tabs and line breaks."""
    return _STEERING.sub(_written, re.sub(r"[\t\r\n]+", " ", text))


def one_line(error: object) -> str:
    """What an error says, as `shown` gives it, without what lies beyond a readable length: a library may quote all of a
    file's names, or its own stack."""
    return shown(" ".join(str(error).split()))[:500]


def shown_lines(text: str) -> str:
    """Like `shown`, with line breaks and tabs as they are."""
    return _STEERING_LINES.sub(_written, text.replace("\r\n", "\n").replace("\r", "\n"))


def shown_cells(rows: Iterable[Iterable[Any]]) -> list[list[Any]]:
    """The cells of a table, those that are text as `shown` gives them."""
    return [[shown(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]


def redact(text: str) -> str:
    """`text` with user and password of every URI, and values that are called a password, a token, a key or a secret,
    replaced by `***`. In doubt, more than that is replaced."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def holds_secret(uri: str) -> bool:
    """Whether a URI holds a password, a token or the like; a user's name alone is none."""
    _, *queries = _SECRETS
    return bool(_PASSWORD.search(uri)) or any(pattern.search(uri) for pattern, _ in queries)


def _written(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
