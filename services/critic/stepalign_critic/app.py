"""The critic's HTTP API. ``create_app`` wires it; there are no module-level singletons.

Every error has one envelope, at whatever point it was raised.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.routing import Route

from stepalign.errors import PromptError
from stepalign.types import SCHEMA_VERSION, ModelInfo, ModelList
from stepalign_critic.cache import CritiqueCache
from stepalign_critic.errors import ServiceError
from stepalign_critic.http import examples
from stepalign_critic.http.access import ApiKeys, RequireApiKey
from stepalign_critic.http.admission import RefuseByHead
from stepalign_critic.http.answering import Answering
from stepalign_critic.http.batch_route import add_batch_route
from stepalign_critic.http.cors import CorsHeaders, Preflights
from stepalign_critic.http.critique_route import add_critique_route
from stepalign_critic.http.envelope import detail_of, enveloped, error_response, invalid_detail, message_of
from stepalign_critic.http.examples import DocumentedApp, error_answers
from stepalign_critic.http.json_body import JsonRoute, UnreadBodyError
from stepalign_critic.http.methods import Allowed, Methods
from stepalign_critic.http.middleware import BodyLimit, RequestContext
from stepalign_critic.http.rate_limit import RateLimiter
from stepalign_critic.lifecycle import State
from stepalign_critic.metrics import Metrics
from stepalign_critic.service import CriticService

_CODES = {404: "not_found", 400: "invalid_request"}


@dataclass(frozen=True)
class AppSettings:
    """Limits of the HTTP layer."""

    max_body_bytes: int = 128 * 1024
    body_seconds: float = 20.0
    """How long a client may take to send a body."""
    max_batch_items: int = 64
    retry_after_seconds: float = 1.0
    """Seconds that a 503 asks the client to wait."""
    api_keys: ApiKeys | None = None
    """The accepted keys; None asks for none."""
    cache: CritiqueCache | None = None
    """Keeps answers; the app closes it at its end. None makes every answer anew."""
    limiter: RateLimiter | None = None
    """Limits the critiques of each API key. None limits nothing."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may ask the service; ``*`` stands for all."""


def create_app(service: CriticService, settings: AppSettings | None = None, metrics: Metrics | None = None) -> FastAPI:
    """The app around ``service``. Its lifespan starts the backend in the background and stops it.

    It counts in ``metrics``. With API keys the app does not show them: they belong on a port that only the inside
    reaches.
    """
    settings = AppSettings() if settings is None else settings
    metrics = Metrics(service.engine_registry()) if metrics is None else metrics

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.lifecycle.begin()
        yield
        await service.lifecycle.end()
        if settings.cache is not None:
            await settings.cache.close()

    app = DocumentedApp(
        keys=settings.api_keys is not None,
        title="stepalign critic",
        version=version("stepalign"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.router.route_class = JsonRoute
    service.on_answer = metrics.count_answer
    service.judge.on_unknown = metrics.answers_unknown.inc
    answering = Answering(service, metrics, settings.cache, settings.limiter)
    add_critique_route(app, answering)
    add_batch_route(app, answering, settings.max_batch_items)
    if settings.cache is not None:
        settings.cache.on_store_error = metrics.store_errors.inc
    _add_operations(app, service)
    if settings.api_keys is None:
        _add_metrics(app, metrics)
    allowed = Allowed(app.routes)
    _add_error_handlers(app, settings, allowed)
    paths = frozenset(route.path for route in app.routes if isinstance(route, Route))
    app.add_middleware(Methods, allowed=allowed)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, seconds=settings.body_seconds)
    if settings.api_keys is not None:
        app.add_middleware(RequireApiKey, keys=settings.api_keys)
    if settings.cors_origins:
        app.add_middleware(Preflights, origins=settings.cors_origins)
    app.add_middleware(RefuseByHead)
    app.add_middleware(RequestContext, metrics=metrics, paths=paths, lifecycle=service.lifecycle)
    if settings.cors_origins:
        app.add_middleware(CorsHeaders, origins=settings.cors_origins)
    return app


_ALWAYS = error_answers(401, 500, never={"prompt_error"})


def _add_operations(app: FastAPI, service: CriticService) -> None:
    not_ready = error_answers(503, never={"saturated"})

    @app.get("/v1/models", response_model=ModelList, responses={200: examples.MODELS, **_ALWAYS, **not_ready})
    async def models() -> ModelList:
        refusal = service.lifecycle.refusal()
        if refusal is not None:
            raise refusal
        identity, created = service.identity(), service.lifecycle.ready_since
        assert created is not None, "a critic that takes requests has started"
        info = identity.model_dump(exclude={"model"})
        return ModelList(data=[ModelInfo(id=identity.model, created=int(created), **info)])

    @app.get("/health/live", responses={200: examples.LIVE})
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready", responses={200: examples.READY, **not_ready})
    @app.get("/health", responses={200: examples.READY, **not_ready})
    async def ready() -> dict[str, str]:
        refusal = service.lifecycle.unreadiness()
        if refusal is not None:
            raise refusal
        return {"status": "ready"}

    @app.get("/version", responses={200: examples.VERSION, **_ALWAYS})
    async def versions() -> dict[str, Any]:
        started = service.lifecycle.state in (State.READY, State.DRAINING, State.STOPPING)
        critic = service.identity().model_dump() if started else None
        return {"version": app.version, "schema_version": SCHEMA_VERSION, "critic": critic}


def _add_metrics(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/metrics", response_class=Response, responses={200: examples.METRICS_TEXT, 500: _ALWAYS[500]})
    async def metrics_text() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _add_error_handlers(app: FastAPI, settings: AppSettings, allowed: Allowed) -> None:
    @app.exception_handler(ServiceError)
    @app.exception_handler(PromptError)
    async def unanswered(_: Request, error: ServiceError | PromptError) -> JSONResponse:
        status, detail = detail_of(error)
        seconds = error.retry_after if isinstance(error, ServiceError) else None
        if seconds is None and status == 503:
            seconds = settings.retry_after_seconds
        return enveloped(status, detail, None if seconds is None else {"retry-after": str(max(1, math.ceil(seconds)))})

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # Of a body's field the path begins with "body".
        return enveloped(422, invalid_detail((tuple(found["loc"][1:]), message_of(found)) for found in error.errors()))

    @app.exception_handler(UnreadBodyError)
    async def unread(_: Request, error: UnreadBodyError) -> JSONResponse:
        said = str(error.detail)
        return error_response(error.status_code, said, error.code, param=error.param, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 405:
            allow = allowed.header(request.scope["path"])
            assert allow is not None, "only a path that allows something refuses a method"
            said = f"{request.method} is not allowed here; {allow} are"
            return error_response(405, said, "method_not_allowed", headers={"allow": allow})
        code = _CODES.get(error.status_code, "http_error")
        return error_response(error.status_code, str(error.detail), code, headers=error.headers)
