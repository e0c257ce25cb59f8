"""The context of each rollout: what its self-teacher will see. Critiques are fetched with bounded concurrency."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from stepalign.client import CriticClient
from stepalign.config import CriticSection
from stepalign.errors import ConfigError, CriticError, CriticRequestError, CriticUnavailableError
from stepalign.logging import get_logger
from stepalign.secret_files import read_secret
from stepalign.types import Context, ContextKind, Critique, CritiqueRequest, CritiqueResponse, Rollout

log = get_logger(__name__)

RETRY_SECONDS = 2.0
READY_SECONDS = 10.0
# No key, no such path, no such method: what answers is not a critic that takes our requests at all.
NO_CRITIC = frozenset({401, 403, 404, 405})


def open_critic(settings: CriticSection) -> CriticClient | None:
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
class ContextResult:
    """A context, or the counted reason why the rollout is skipped. ``critique_outcome`` is None without a critic."""

    context: Context | None
    critique: Critique | None = None
    skip_reason: str | None = None
    critique_outcome: str | None = None


class Contexts:
    """Makes the contexts of one kind."""

    def __init__(self, kind: ContextKind, critic: CritiqueSource | None, concurrency: int) -> None:
        """Raises ConfigError for critiques without a critic."""
        if kind is ContextKind.CRITIQUE and critic is None:
            raise ConfigError("critic.url is not set: give the address of a critic or of its load balancer")
        self.kind = kind
        self.critic = critic
        self.slots = asyncio.Semaphore(concurrency)

    async def fetch(self, rollouts: Sequence[Rollout]) -> list[ContextResult]:
        """One result per rollout, in order."""
        return list(await asyncio.gather(*(self._context(rollout) for rollout in rollouts)))

    async def _context(self, rollout: Rollout) -> ContextResult:
        if self.kind is ContextKind.NULL:
            return ContextResult(Context(kind=self.kind, text=""))
        if self.kind is ContextKind.REFERENCE:
            reference = rollout.problem.reference_solution
            if reference is None:
                return ContextResult(None, skip_reason="no_reference_solution")
            return ContextResult(Context(kind=self.kind, text=reference))
        async with self.slots:
            with structlog.contextvars.bound_contextvars(rollout_id=rollout.rollout_id):
                return await self._critique(rollout)

    async def _critique(self, rollout: Rollout) -> ContextResult:
        request = CritiqueRequest(
            question=rollout.problem.question,
            attempt=rollout.text,
            reference_solution=rollout.problem.reference_solution,
            answer=rollout.problem.answer,
        )
        try:
            response = await self._insist(request, rollout.rollout_id)
        except CriticRequestError as error:
            if error.status in NO_CRITIC:
                raise
            log.warning("the critic refused the request", status=error.status, code=error.code, error=str(error))
            reason = "critic_refused_" + re.sub(r"[^\w.-]", "_", error.code or str(error.status))[:60]
            return ContextResult(None, skip_reason=reason, critique_outcome=reason)
        except CriticError as error:
            log.error("the critic's answer cannot be used", error=str(error))
            return ContextResult(None, skip_reason="critic_error", critique_outcome="critic_error")
        if response.critique is None:
            assert response.failure is not None
            reason = response.failure.reason.value
            log.info("critique refused", reason=reason, detail=response.failure.detail)
            return ContextResult(None, skip_reason=f"critique_{reason}", critique_outcome=reason)
        critique = response.critique
        context = Context(kind=self.kind, text=critique.text)
        return ContextResult(context, critique, critique_outcome=critique.verdict.value)

    async def _insist(self, request: CritiqueRequest, rollout_id: str) -> CritiqueResponse:
        """Wait for an unreachable critic as long as it takes: a rollout is never lost to an outage."""
        assert self.critic is not None
        while True:
            try:
                return await self.critic.critique(request, request_id=rollout_id)
            except CriticUnavailableError as error:
                delay = error.retry_after or RETRY_SECONDS
                log.warning("the critic is not available; waiting", error=str(error), retry_seconds=delay)
                await asyncio.sleep(delay)
