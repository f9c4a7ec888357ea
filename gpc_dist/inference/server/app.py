"""The HTTP application of a server: its routes, and how errors are answered."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from gpc_dist import __version__
from gpc_dist.errors import UserError
from gpc_dist.inference.server.answers import Adapters, AdapterShown, Answer, Asked, Predicted, Problem, State
from gpc_dist.inference.server.batcher import FullError, PassError
from gpc_dist.inference.server.gate import Gate
from gpc_dist.inference.server.service import Service

_CLIENT_GONE = 499
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": why}
    for code, why in {
        401: "The token is missing or wrong.",
        404: "There is no such adapter.",
        413: "The request is too large.",
        422: "A row is none of the task's.",
        429: "Too much is waiting; Retry-After says when to ask again.",
        504: "There was no answer in time.",
    }.items()
}

T = TypeVar("T")


def make_app(service: Service) -> FastAPI:
    """The application; it answers while its lifespan lasts."""
    app = FastAPI(
        title="gpc-dist serve",
        version=__version__,
        description="Adapters of one frozen encoder.",
        redoc_url=None,
        lifespan=lambda _: service.running(),
    )
    _add_routes(app, service)
    _add_error_handlers(app)

    def observe(scope: Scope, status: int, seconds: float) -> None:
        if scope["path"].startswith("/v1/") and scope["method"] == "POST":
            name = scope.get("path_params", {}).get("name", "")
            service.metrics.request(name if name in service.catalog.held else "", status, seconds)

    app.add_middleware(
        Gate,
        token=service.options.token,
        most_bytes=service.options.most_body_kib * 1024,
        timeout_s=service.options.timeout_s,
        observe=observe,
    )
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    body = {"required": True, "content": {"application/json": {"schema": Asked.model_json_schema()}}}

    @app.post(
        "/v1/adapters/{name}/predict",
        response_model=Answer,
        responses=_PROBLEMS,
        openapi_extra={"requestBody": body},
    )
    async def predict(name: str, request: Request) -> Response:
        """The adapter's prediction for each row, as `gpc-dist predict` gives it."""
        held, most = service.catalog.held.get(name), service.options.most_rows
        if held is None:
            known = ", ".join(sorted(service.catalog.held))
            raise HTTPException(404, f"there is no adapter '{name}': there are {known}")
        # as JSON of others is read everywhere
        rows = Asked.parse(await request.body()).of(held.loaded.task)
        if len(rows) > most:
            raise HTTPException(413, f"the request has {len(rows)} rows, and may have {most}: ask in parts")
        predictions = await _while_connected(request, service.predict(held.loaded, rows))
        if predictions is None:
            return Response(status_code=_CLIENT_GONE)
        # written by pydantic, which has null for what is no number
        answer = Answer(predictions=list(map(Predicted.of, predictions)))
        return Response(answer.model_dump_json(), media_type="application/json")

    @app.get("/v1/adapters")
    async def adapters() -> Adapters:
        """The adapters, and what each reads and answers."""
        held = sorted(service.catalog.held.items())
        return Adapters(
            encoder=service.catalog.encoder.name, adapters=[AdapterShown.of(*each) for each in held]
        )

    @app.get("/healthz")
    async def healthz() -> State:
        """Whether the process answers."""
        return State(status="alive")

    @app.get("/readyz", responses={503: {"model": Problem}})
    async def readyz() -> State:
        """Whether requests are answered."""
        if not service.ready:
            raise HTTPException(503, "no requests are answered: see the server's log")
        return State(status="ready")

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` gives; None, and `work` is cancelled, once the client has gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(work), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return await tasks[0] if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every error with one line under `detail`, as FastAPI does those of HTTP, and never with a stack trace."""

    def refused(status: int, why: str, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"detail": why}, status, headers)

    @app.exception_handler(UserError)
    async def bad_input(_: Request, error: UserError) -> JSONResponse:
        return refused(422, str(error))

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=_CLIENT_GONE)

    @app.exception_handler(FullError)
    async def full(_: Request, error: FullError) -> JSONResponse:
        after = str(error.retry_s)
        return refused(429, f"too much is waiting: ask again in {after} s", {"Retry-After": after})

    @app.exception_handler(PassError)
    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> JSONResponse:
        return refused(500, "this server failed: its log says why")
