"""What a server is told on its command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

TOKEN = "GPC_DIST_SERVE_TOKEN"
"""Environment variable with the token that requests must bring as `Authorization: Bearer`, if it is set."""


@dataclass(frozen=True)
class Options:
    """Adapters, and limits of what is asked of them."""

    places: Sequence[str]
    """As `Place.parse` takes them."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Dotted keys of the engine and the encoder."""
    reload_s: float | None = None
    """Seconds after which the places are looked at again; never when None."""
    wait_ms: float = 5.0
    """How long a row may wait for others to share its pass."""
    batch_tokens: int | None = None
    """Most tokens of a pass, prompts and padding included; when None, as many as suit the device."""
    queue_rows: int = 1024
    """How many rows may be in work."""
    most_rows: int = 128
    """Rows of a request."""
    most_body_kib: int = 1024
    """Size of a request."""
    timeout_s: float = 30.0
    """Seconds in which a request is answered or refused."""
    token: str | None = field(default=None, repr=False)
    """What requests must bring; None lets all in."""
