"""A server that stands before another one, and may answer in its place."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Decision = int | Literal["pass", "drop", "lose"]
"""What becomes of a request: it is answered with this status; it is passed on; its connection is closed; or it is
passed on, and the connection is closed before the answer."""


@contextmanager
def standing_before(uri: str, decide: Callable[[BaseHTTPRequestHandler], Decision]) -> Iterator[str]:
    """Start one before the server at `uri`, which ends with the block; yields its own URI.

    Args:
        decide: called for each request, by the thread that handles it.
    """

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            decision = decide(self)
            if isinstance(decision, int):
                return self._answer(decision, b"<html>an answer of the proxy</html>")
            answer = None if decision == "drop" else self._passed_on(body)
            if decision == "pass" and answer is not None:
                self._answer(*answer)
            else:
                self.close_connection = True

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815 - the library's names

        def _passed_on(self, body: bytes) -> tuple[int, bytes] | None:
            """The other server's answer; None if it gives none."""
            headers = {"Content-Type": self.headers.get("Content-Type", "application/json")}
            asked = urllib.request.Request(uri + self.path, body or None, headers, method=self.command)
            try:
                with urllib.request.urlopen(asked) as answer:
                    return answer.status, answer.read()
            except urllib.error.HTTPError as error:
                return error.code, error.read()
            except OSError:
                return None

        def _answer(self, code: int, body: bytes) -> None:
            with suppress(ConnectionError):  # it may have stopped waiting
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
