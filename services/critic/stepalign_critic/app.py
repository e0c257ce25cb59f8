"""The critic's HTTP API. ``create_app`` wires it; there are no module-level singletons.

``POST /v1/critiques`` answers 200 with either ``critique`` or ``failure``: an answer of the model that does not align
is an answer. Everything else is an error in one envelope, whatever raised it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import Receive

from stepalign.errors import PromptError, PromptTooLongError
from stepalign.logging import get_logger
from stepalign.types import SCHEMA_VERSION, CritiqueRequest, CritiqueResponse
from stepalign_critic.access import ApiKeys, RequireApiKey
from stepalign_critic.envelope import error_response
from stepalign_critic.errors import ServiceError
from stepalign_critic.lifecycle import State
from stepalign_critic.metrics import Metrics, outcome_of
from stepalign_critic.middleware import BodyLimit, RequestContext
from stepalign_critic.service import CriticService

T = TypeVar("T")

_CODES = {404: "not_found", 405: "method_not_allowed", 400: "invalid_request"}

_log = get_logger(__name__)


@dataclass(frozen=True)
class AppSettings:
    """Limits of the HTTP layer."""

    max_body_bytes: int = 128 * 1024
    retry_after_seconds: float = 1.0
    """What a 503 tells the client to wait."""
    api_keys: ApiKeys | None = None
    """The accepted keys; None asks for none."""


def create_app(service: CriticService, settings: AppSettings | None = None) -> FastAPI:
    """The app around ``service``. Its lifespan starts the backend in the background and stops it."""
    settings = AppSettings() if settings is None else settings
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.lifecycle.begin()
        yield
        await service.lifecycle.end()

    app = FastAPI(
        title="stepalign critic",
        version=version("stepalign"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_critiques(app, service, metrics)
    _add_operations(app, service, metrics)
    _add_error_handlers(app, settings)
    paths = frozenset(route.path for route in app.routes if isinstance(route, Route))
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    if settings.api_keys is not None:
        app.add_middleware(RequireApiKey, keys=settings.api_keys)
    app.add_middleware(RequestContext, metrics=metrics, paths=paths, lifecycle=service.lifecycle)
    return app


def _add_critiques(app: FastAPI, service: CriticService, metrics: Metrics) -> None:
    @app.post("/v1/critiques", response_model=CritiqueResponse)
    async def critiques(body: CritiqueRequest, request: Request) -> JSONResponse:
        with metrics.in_flight.track_inprogress(), metrics.seconds.time():
            response = await _until_hang_up(request.receive, service.critique(body))
        metrics.count_critique(response)
        _log.info("critique", critique_id=response.id, outcome=outcome_of(response), **response.usage.model_dump())
        return JSONResponse(response.model_dump(mode="json"))


def _add_operations(app: FastAPI, service: CriticService, metrics: Metrics) -> None:
    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready")
    @app.get("/health")
    async def ready() -> dict[str, str]:
        refusal = service.lifecycle.unreadiness()
        if refusal is not None:
            raise refusal
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics_text() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def versions() -> dict[str, Any]:
        started = service.lifecycle.state in (State.READY, State.DRAINING, State.STOPPING)
        critic = service.identity().model_dump() if started else None
        return {"version": app.version, "schema_version": SCHEMA_VERSION, "critic": critic}


def _add_error_handlers(app: FastAPI, settings: AppSettings) -> None:
    retry_after = {"retry-after": str(math.ceil(settings.retry_after_seconds))}

    @app.exception_handler(ServiceError)
    async def service_error(_: Request, error: ServiceError) -> JSONResponse:
        return error_response(
            error.status, str(error), error.code, headers=retry_after if error.status == 503 else None
        )

    @app.exception_handler(PromptError)
    async def prompt_error(_: Request, error: PromptError) -> JSONResponse:
        if isinstance(error, PromptTooLongError):
            return error_response(422, str(error), "prompt_too_long")
        return error_response(500, str(error), "prompt_error")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = [(_field(item), item["msg"]) for item in error.errors()]
        message = "; ".join(f"{field or 'body'}: {problem}" for field, problem in problems)
        return error_response(422, message, "invalid_request", param=problems[0][0])

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        code = _CODES.get(error.status_code, "http_error")
        return error_response(error.status_code, str(error.detail), code, headers=error.headers)


def _field(item: dict[str, Any]) -> str | None:
    """The dotted path of a field that does not validate; None when the body as a whole is to blame."""
    if item["type"] == "json_invalid":
        return None
    return ".".join(map(str, item["loc"][1:])) or None


async def _until_hang_up(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client hangs up. The body must have been read."""

    async def hung_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.create_task(work)
    tasks = (working, asyncio.create_task(hung_up()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return await working
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
