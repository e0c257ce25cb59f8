"""Critiques over HTTP, alone or in a batch: deadline, metrics and log line around the service, and the endpoint of one.

``POST /v1/critiques`` answers 200 with either ``critique`` or ``failure``: an answer of the model that does not align
is an answer.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Body, FastAPI, Request, Response

from stepalign.types import CritiqueRequest, CritiqueResponse
from stepalign_critic.cache import CritiqueCache, Source
from stepalign_critic.errors import DeadlineUnreachableError
from stepalign_critic.http.deadlines import TIMEOUT_PARAMETER, check_reachable, deadline_of, within
from stepalign_critic.http.examples import CACHE_HEADER, CRITIQUE, REQUEST_EXAMPLE, errors
from stepalign_critic.http.hang_up import until_hang_up
from stepalign_critic.http.rate_limit import RateLimiter
from stepalign_critic.lifecycle import Lifecycle
from stepalign_critic.metrics import Metrics, outcome_of
from stepalign_critic.service import CriticService, new_id
from stepalign_critic.tenant import caller
from stepalign_run.logging import get_logger

Asked = Annotated[CritiqueRequest, Body(examples=[REQUEST_EXAMPLE])]

_log = get_logger(__name__)


class Critiques:
    """Asks ``service`` and counts what it answers."""

    def __init__(
        self,
        service: CriticService,
        metrics: Metrics,
        cache: CritiqueCache | None = None,
        limiter: RateLimiter | None = None,
    ) -> None:
        self._service = service
        self._metrics = metrics
        self._cache = cache
        self._limiter = limiter

    @property
    def lifecycle(self) -> Lifecycle:
        return self._service.lifecycle

    async def answer(self, request: CritiqueRequest, deadline: float | None) -> tuple[CritiqueResponse, Source]:
        """The answer, before ``deadline``, and where it came from. Raises ServiceError or PromptError without one."""
        refusal = self.lifecycle.refusal()
        if refusal is not None:
            raise refusal
        if self._limiter is not None:
            self._limiter.take(caller())
        with self._metrics.in_flight.track_inprogress(), self._metrics.seconds.time():
            async with self.lifecycle.answering():
                response, source = await within(deadline, lambda: self._find_or_make(request, deadline))
        if source is not Source.MISS:
            response = response.model_copy(update={"id": new_id()})
        self._metrics.count_critique(response, source)
        usage = response.usage.model_dump()
        _log.info("critique", critique_id=response.id, outcome=outcome_of(response), cache=source, **usage)
        return response, source

    async def _find_or_make(self, request: CritiqueRequest, deadline: float | None) -> tuple[CritiqueResponse, Source]:
        if self._cache is None:
            check_reachable(deadline, self.lifecycle)
            return await self._service.critique(request), Source.MISS
        key = self._cache.key_of(request, self._service.shaping())
        # What is kept or being made needs no place in the queue.
        if not self._cache.holds(key):
            try:
                check_reachable(deadline, self.lifecycle)
            except DeadlineUnreachableError:
                shared = await self._cache.shared(key)
                if shared is None:
                    raise
                return shared, Source.SHARED
        return await self._cache.get_or_make(key, lambda: self._service.critique(request))


def add_critiques(app: FastAPI, critiques: Critiques) -> None:
    """Add ``POST /v1/critiques``."""

    @app.post(
        "/v1/critiques",
        response_model=CritiqueResponse,
        responses={200: CRITIQUE, **errors(400, 401, 408, 413, 422, 429, 500, 502, 503, 504)},
        openapi_extra={"parameters": [TIMEOUT_PARAMETER]},
    )
    async def critiques_endpoint(body: Asked, request: Request) -> Response:
        response, source = await until_hang_up(request.receive, critiques.answer(body, deadline_of(request)))
        return Response(response.model_dump_json(), media_type="application/json", headers={CACHE_HEADER: source})
