"""The critiques of a batch: the critic is asked with bounded concurrency, and waited for when it is away."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Protocol

import structlog

from stepalign.client import ENGINE_TIMEOUT, CriticClient
from stepalign.errors import CriticError, CriticRequestError, CriticUnavailableError
from stepalign.secret_files import read_secret
from stepalign.types import Critique, CritiqueMode, CritiqueRequest, CritiqueResponse
from stepalign_run.config import CriticClientSection
from stepalign_run.logging import get_logger
from stepalign_run.rollout import Rollout

log = get_logger(__name__)

RETRY_SECONDS = 2.0
TIMEOUT_TRIES = 5
"""How often a critique is asked for that takes longer than the critic's engine may take."""
LONGEST_PAUSE_SECONDS = 600.0
"""Up to here the pauses between them double."""
READY_SECONDS = 10.0
# No key, no such path, no such method: no critic that takes our requests answers there.
NO_CRITIC = frozenset({401, 403, 404, 405})


def open_critic(settings: CriticClientSection) -> CriticClient | None:
    """The client of the configured critic, None without one. Raises ConfigError when its key cannot be read."""
    if settings.url is None:
        return None
    key = read_secret("critic.api_key_file", settings.api_key_file) if settings.api_key_file is not None else None
    return CriticClient(settings.url, api_key=key, timeout=settings.timeout_seconds)


async def await_critic(critic: CriticClient) -> None:
    """Wait for the critic as long as it takes, and say so. Raises CriticError when something else answers there."""
    while True:
        try:
            return await critic.wait_ready(READY_SECONDS)
        except CriticUnavailableError as error:
            log.warning("the critic is not available; waiting", error=str(error))


class CritiqueSource(Protocol):
    async def critique(self, request: CritiqueRequest, request_id: str | None = None) -> CritiqueResponse: ...


@dataclass(frozen=True)
class Critiqued:
    """The critique of a rollout and the context made of it, or why there is none.

    ``outcome`` is the verdict or the reason, None where no critic was asked.
    """

    critique: Critique | None
    context: str | None = None
    skip_reason: str | None = None
    outcome: str | None = None


class Critiques:
    def __init__(self, critic: CritiqueSource, concurrency: int) -> None:
        self._critic = critic
        self._slots = asyncio.Semaphore(concurrency)

    async def ask(self, rollout: Rollout, mode: CritiqueMode) -> Critiqued:
        """Raises CriticRequestError when no critic answers there."""
        async with self._slots:
            with structlog.contextvars.bound_contextvars(rollout_id=rollout.rollout_id):
                return await self._ask(rollout, mode)

    async def _ask(self, rollout: Rollout, mode: CritiqueMode) -> Critiqued:
        request = CritiqueRequest(
            question=rollout.problem.question,
            attempt=rollout.text,
            reference_solution=rollout.problem.reference_solution,
            answer=rollout.problem.answer,
            mode=mode,
        )
        try:
            response = await self._insist(request, rollout.rollout_id)
        except CriticRequestError as error:
            if error.status in NO_CRITIC:
                raise
            log.warning("the critic refused the request", status=error.status, code=error.code, error=str(error))
            reason = "critic_refused_" + re.sub(r"[^\w.-]", "_", error.code or str(error.status))[:60]
            return Critiqued(None, skip_reason=reason, outcome=reason)
        except CriticError as error:
            reason = "critic_timeout" if isinstance(error, CriticUnavailableError) else "critic_error"
            log.error("the critic's answer cannot be used", reason=reason, error=str(error))
            return Critiqued(None, skip_reason=reason, outcome=reason)
        if response.critique is None:
            assert response.failure is not None
            reason = response.failure.reason.value
            log.info("critique refused", reason=reason, detail=response.failure.detail)
            return Critiqued(None, skip_reason=f"critique_{reason}", outcome=reason)
        return Critiqued(response.critique, response.context, outcome=response.critique.verdict.value)

    async def _insist(self, request: CritiqueRequest, rollout_id: str) -> CritiqueResponse:
        """Wait for an unreachable critic as long as it takes: a rollout is never lost to an outage.

        Raises CriticUnavailableError when the critic's engine took too long ``TIMEOUT_TRIES`` times: a passing queue
        ends before that, and what is too long by itself must not hold up the run.
        """
        timeouts = 0
        while True:
            try:
                return await self._critic.critique(request, request_id=rollout_id)
            except CriticUnavailableError as error:
                delay = error.retry_after or RETRY_SECONDS
                if error.code == ENGINE_TIMEOUT:
                    delay = max(delay, min(delay * 2**timeouts, LONGEST_PAUSE_SECONDS))
                    timeouts += 1
                if timeouts == TIMEOUT_TRIES:
                    raise
                log.warning("the critic is not available; waiting", error=str(error), retry_seconds=delay)
                await asyncio.sleep(delay)
