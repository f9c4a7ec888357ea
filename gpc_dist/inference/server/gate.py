"""What stands between the socket and the application: who may ask, how much, and for how long."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

OPEN = ("/healthz", "/readyz", "/docs", "/openapi.json")
"""Paths that need no token: they tell nothing of adapters."""


class Gate:
    """ASGI middleware that refuses requests without the token, or with too large a body, and ends those that take too
    long.

    Args:
        token: what requests must bring; None lets all in.
        most_bytes: size of a body.
        timeout_s: from the request's headers to its answer, the reading of its body included.
        observe: is told of each request: its scope, its status and its seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str | None,
        most_bytes: int,
        timeout_s: float,
        observe: Callable[[Scope, int, float], None],
    ):
        self._app, self._most_bytes, self._timeout_s, self._observe = app, most_bytes, timeout_s, observe
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_s, status = time.monotonic(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                refusal = await self._answered(scope, receive, counted, lambda: status != 0)
            if refusal is not None:
                await refusal(scope, receive, counted)
        finally:
            self._observe(scope, status or 500, time.monotonic() - start_s)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        """The answer to a request that is not let in."""
        headers = Headers(scope=scope)
        if self._token is not None and scope["path"] not in OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            # headers are read as Latin-1, whatever they were written as
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode("latin-1"), self._token):
                return _refused(401, "bring the server's token as Authorization: Bearer", "Bearer")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._most_bytes:
            return _refused(413, self._too_large)
        return None

    async def _answered(
        self, scope: Scope, receive: Receive, send: Send, begun: Callable[[], bool]
    ) -> JSONResponse | None:
        """Let the application answer; gives the answer to send in its place if it was too late."""
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most_bytes:
                raise HTTPException(413, self._too_large)
            return message

        try:
            async with asyncio.timeout(self._timeout_s):
                await self._app(scope, limited, send)
        except TimeoutError:
            if not begun():
                return _refused(
                    504, f"there was no answer within {self._timeout_s:g} s: ask again, or for less"
                )
        return None

    @property
    def _too_large(self) -> str:
        return f"a request may have {self._most_bytes} bytes: ask in parts"


def _refused(status: int, why: str, scheme: str | None = None) -> JSONResponse:
    headers = {"WWW-Authenticate": scheme} if scheme else None
    return JSONResponse({"detail": why}, status, headers)
