"""Answers to requests: deadline, rate limit, cache, metrics and log line around the service.

The routes of one critique and of a batch share it.
"""

from __future__ import annotations

import asyncio
import time

from stepalign.types import CritiqueRequest
from stepalign_critic.cache import CritiqueCache, Found, Source
from stepalign_critic.errors import DeadlineUnreachableError
from stepalign_critic.http.deadlines import check_reachable, within
from stepalign_critic.http.rate_limit import RateLimiter
from stepalign_critic.lifecycle import Lifecycle
from stepalign_critic.metrics import Metrics, outcome_of
from stepalign_critic.service import CriticService, new_id
from stepalign_critic.tenant import caller
from stepalign_run.logging import get_logger

_log = get_logger(__name__)


class Answering:
    """Asks the cache or ``service`` for answers, and counts them."""

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
        """The states of the service's process."""
        return self._service.lifecycle

    async def answer(self, request: CritiqueRequest, deadline: float | None) -> Found:
        """The answer, before ``deadline``. Raises ServiceError or PromptError without one."""
        refusal = self.lifecycle.refusal()
        if refusal is not None:
            raise refusal
        if self._limiter is not None:
            self._limiter.take(caller())
        began = time.perf_counter()
        with self._metrics.in_flight.track_inprogress():
            async with self.lifecycle.answering():
                found = await within(deadline, lambda: self._find_or_make(request, deadline))
        seconds = time.perf_counter() - began
        if found.source is not Source.MISS:
            found = Found(found.response.model_copy(update={"id": new_id()}), found.source)
        # The answer goes out first: what is counted and logged makes no client wait.
        asyncio.get_running_loop().call_soon(self._account, found, seconds)
        return found

    def _account(self, found: Found, seconds: float) -> None:
        """Count and log an answer. A client that hung up and a refusal have none, and no time of one."""
        response, usage = found.response, found.response.usage
        self._metrics.seconds.observe(seconds)
        self._metrics.count_critique(response, found.source)
        _log.info(
            "critique",
            critique_id=response.id,
            outcome=outcome_of(response),
            cache=found.source,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
        )

    async def _find_or_make(self, request: CritiqueRequest, deadline: float | None) -> Found:
        if self._cache is None:
            check_reachable(deadline, self.lifecycle)
            return Found(await self._service.critique(request), Source.MISS)
        key = self._cache.key_of(request, self._service.shaping())
        # An answer that is kept or on its way needs no place in the queue.
        if not self._cache.holds(key):
            try:
                check_reachable(deadline, self.lifecycle)
            except DeadlineUnreachableError:
                shared = await self._cache.shared(key)
                if shared is None:
                    raise
                return Found(shared, Source.SHARED)
        return await self._cache.get_or_make(key, lambda: self._service.critique(request))
