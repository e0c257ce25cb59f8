"""The context of each rollout: what its self-teacher will see. Critiques are fetched with bounded concurrency."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from stepalign.client import CriticClient
from stepalign.errors import ConfigError, CriticError, CriticRequestError, CriticUnavailableError
from stepalign.plugins import Checker
from stepalign.scoring import trace_critique
from stepalign.secret_files import read_secret
from stepalign.types import Critique, CritiqueMode, CritiqueRequest, CritiqueResponse
from stepalign_run.config import CriticClientSection
from stepalign_run.context import CRITIQUE_CONTEXTS, Context, ContextKind
from stepalign_run.logging import get_logger
from stepalign_run.rollout import Rollout

log = get_logger(__name__)

RETRY_SECONDS = 2.0
READY_SECONDS = 10.0
# No key, no such path, no such method: what answers is not a critic that takes our requests at all.
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


MODES = {
    ContextKind.FULL_REPETITION: CritiqueMode.FULL_REPETITION,
    ContextKind.OMISSION: CritiqueMode.OMISSION,
}
"""What the critic is asked for; a context as it is meant by default."""


@dataclass(frozen=True)
class ContextResult:
    """A context, or the counted reason why the rollout is skipped.

    ``critique`` is that of this very rollout, by the critic or else by the exact checker: it tells where the first
    error is, whatever the teacher sees. ``critique_outcome`` is None without a critic.
    """

    context: Context | None
    critique: Critique | None = None
    skip_reason: str | None = None
    critique_outcome: str | None = None


@dataclass(frozen=True)
class _Own:
    """The critique of a rollout and the context made of it, or why there is none."""

    critique: Critique | None
    context: str | None = None
    skip_reason: str | None = None
    outcome: str | None = None


class Contexts:
    """Makes the contexts of one kind. ``checker`` says where errors are in arms without a critic; figures only."""

    def __init__(
        self, kind: ContextKind, critic: CritiqueSource | None, concurrency: int, checker: Checker | None = None
    ) -> None:
        """Raises ConfigError for critiques without a critic."""
        if kind in CRITIQUE_CONTEXTS and critic is None:
            raise ConfigError("critic.url is not set: give the address of a critic or of its load balancer")
        self.kind = kind
        self.critic = critic
        self.slots = asyncio.Semaphore(concurrency)
        self.checker = checker

    async def fetch(self, rollouts: Sequence[Rollout]) -> list[ContextResult]:
        """One result per rollout, in order. Kinds that need another problem take the next one in the batch."""
        owns = await asyncio.gather(*(self._own(rollout) for rollout in rollouts))
        return [self._result(i, rollouts, owns) for i in range(len(rollouts))]

    def _result(self, index: int, rollouts: Sequence[Rollout], owns: Sequence[_Own]) -> ContextResult:
        own = owns[index]
        if own.skip_reason is not None:
            return ContextResult(None, None, own.skip_reason, own.outcome)
        text, missing = self._text(index, rollouts, owns)
        if text is None:
            return ContextResult(None, own.critique, missing, own.outcome)
        return ContextResult(Context(kind=self.kind, text=text), own.critique, None, own.outcome)

    def _text(self, index: int, rollouts: Sequence[Rollout], owns: Sequence[_Own]) -> tuple[str | None, str]:
        """The context's text, or None and the reason to count."""
        rollout = rollouts[index]
        others = [
            i for i in (*range(index + 1, len(rollouts)), *range(index)) if rollouts[i].problem.id != rollout.problem.id
        ]
        match self.kind:
            case ContextKind.NULL:
                return "", ""
            case ContextKind.REFERENCE:
                return rollout.problem.reference_solution, "no_reference_solution"
            case ContextKind.OTHER_PROBLEM:
                references = (rollouts[i].problem.reference_solution for i in others)
                return next((text for text in references if text is not None), None), "no_other_reference"
            case ContextKind.SHUFFLED_CRITIQUE:
                contexts = (owns[i].context for i in others)
                return next((text for text in contexts if text is not None), None), "no_other_critique"
            case ContextKind.CRITIQUE | ContextKind.FULL_REPETITION | ContextKind.OMISSION:
                assert owns[index].context is not None
                return owns[index].context, ""

    async def _own(self, rollout: Rollout) -> _Own:
        if self.kind not in CRITIQUE_CONTEXTS:
            critique = None
            if self.checker is not None:
                critique = trace_critique(rollout.problem, rollout.text, self.checker)
            return _Own(critique)
        async with self.slots:
            with structlog.contextvars.bound_contextvars(rollout_id=rollout.rollout_id):
                return await self._critique(rollout)

    async def _critique(self, rollout: Rollout) -> _Own:
        request = CritiqueRequest(
            question=rollout.problem.question,
            attempt=rollout.text,
            reference_solution=rollout.problem.reference_solution,
            answer=rollout.problem.answer,
            mode=MODES.get(self.kind, CritiqueMode.STEP_ALIGNED),
        )
        try:
            response = await self._insist(request, rollout.rollout_id)
        except CriticRequestError as error:
            if error.status in NO_CRITIC:
                raise
            log.warning("the critic refused the request", status=error.status, code=error.code, error=str(error))
            reason = "critic_refused_" + re.sub(r"[^\w.-]", "_", error.code or str(error.status))[:60]
            return _Own(None, skip_reason=reason, outcome=reason)
        except CriticError as error:
            log.error("the critic's answer cannot be used", error=str(error))
            return _Own(None, skip_reason="critic_error", outcome="critic_error")
        if response.critique is None:
            assert response.failure is not None
            reason = response.failure.reason.value
            log.info("critique refused", reason=reason, detail=response.failure.detail)
            return _Own(None, skip_reason=f"critique_{reason}", outcome=reason)
        return _Own(response.critique, response.context, outcome=response.critique.verdict.value)

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
