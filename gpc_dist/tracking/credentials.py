"""Which tracking servers get this user's credentials: those that the user named.

MLflow sends MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or what
`~/.mlflow/credentials` holds, to whatever server it talks to. A server that only a file names (a recipe, a run's
`config.yaml`) may be somebody else's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from gpc_dist.config import NO_SECRET
from gpc_dist.errors import UserError
from gpc_dist.shown import holds_secret, redact

URI = "MLFLOW_TRACKING_URI"

_FILE = "~/.mlflow/credentials"
_PORTS = {"http": 80, "https": 443}
_VARIABLES = {
    "http": (
        "MLFLOW_TRACKING_TOKEN",
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_AUTH",
    ),
    "postgresql": ("PGPASSWORD",),
}
"""What is sent to a host, by the beginning of a URI's scheme."""


@contextmanager
def named_by_user(uri: str | None) -> Iterator[None]:
    """Let the URI of a command line, if there is one, be MLFLOW_TRACKING_URI while the block runs, for this process and
    those that it starts: of what they find in files, they then know the user's.

    Raises:
        UserError: it holds a password.
    """
    if uri in (None, "", "null"):
        yield
        return
    if holds_secret(uri):
        raise UserError(f"the tracking URI {redact(uri)} {NO_SECRET}")
    before = os.environ.get(URI)
    os.environ[URI] = uri
    try:
        yield
    finally:
        if before is None:
            del os.environ[URI]
        else:
            os.environ[URI] = before


def check_server(uri: str) -> None:
    """Refuse a server that would get credentials which the user did not mean for it.

    Args:
        uri: a result of `store.tracking_uri`.

    Raises:
        UserError: the user has credentials for a tracking server, and MLFLOW_TRACKING_URI does not name this one.
    """
    held, given = _credentials(uri), os.environ.get(URI, "")
    if held and uri != given and (_server(uri) is None or _server(uri) != _server(given)):
        raise UserError(
            f"the tracking store {redact(uri)} is named by a file alone, and would get your credentials ({held}): if "
            f"it is yours, say so with {URI}, --tracking.uri, or --uri of gpc-dist sync; if not, unset them"
        )


def _credentials(uri: str) -> str:
    """What of this user's would be sent to a URI's server; empty if nothing."""
    try:
        scheme = urlsplit(uri).scheme  # as MLflow finds it
    except ValueError:
        scheme = "http"
    found = [name for start, names in _VARIABLES.items() if scheme.startswith(start) for name in names]
    found = [name for name in found if os.environ.get(name)]
    if scheme.startswith("http") and Path(_FILE).expanduser().is_file():
        found.append(_FILE)
    return ", ".join(found)


def _server(uri: str) -> tuple[str, str, int] | None:
    """What tells tracking servers apart: scheme (a token that goes over TLS must not go without it), host and port.

    Returns:
        None for what is no address of one. Of databases there is no telling: options of a URI can name another host.
    """
    # the parser of the library that sends the requests: another one may find another host, as in https://a\@b
    from urllib3.exceptions import LocationParseError
    from urllib3.util import parse_url

    try:
        parts = parse_url(uri)
    except LocationParseError:
        return None
    if parts.scheme not in _PORTS or not parts.host:
        return None
    return parts.scheme, parts.host, parts.port or _PORTS[parts.scheme]
