"""The context of each rollout, for its self-teacher. A kind of context is one class and one prompt file."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from stepalign.critique.answers import Grader, answers_equal
from stepalign.errors import ConfigError, GraderError
from stepalign.plugins import Checker
from stepalign.scoring import trace_critique
from stepalign.types import Critique, CritiqueMode
from stepalign_run.context import Context, ContextKind
from stepalign_run.logging import get_logger
from stepalign_run.rollout import Rollout
from stepalign_trainer.batch.critiques import Critiqued, Critiques, CritiqueSource

log = get_logger(__name__)


@dataclass(frozen=True)
class Source:
    """A rollout and its critique, the material of contexts besides the problem."""

    rollout: Rollout
    own: Critiqued


class ContextClass(ABC):
    """One kind of context. Whether it is made from critiques is said by ``ContextKind.needs_critic``."""

    prompt: ClassVar[str | None]
    """The file of the teacher's prompt in the prompt set; None for the student's own prompt."""
    mode: ClassVar[CritiqueMode] = CritiqueMode.STEP_ALIGNED
    """The form of the critiques that it is made from."""
    missing: ClassVar[str] = ""
    """The counted reason for skipping a rollout that has no text."""

    @abstractmethod
    def text(self, source: Source, others: Sequence[Source]) -> str | None:
        """The context's text. ``others`` are the batch's rollouts of other problems, the next one first.

        For a kind that needs a critic ``source`` has a critique; ``others`` may have none.
        """


class NoContext(ContextClass):
    """The teacher's prompt is the student's."""

    prompt = None

    def text(self, source: Source, others: Sequence[Source]) -> str | None:
        return ""


class ReferenceContext(ContextClass):
    prompt = "teacher_reference"
    missing = "no_reference_solution"

    def text(self, source: Source, others: Sequence[Source]) -> str | None:
        return source.rollout.problem.reference_solution


class OtherProblemContext(ContextClass):
    """The reference solution of the next problem in the batch that has one."""

    prompt = "teacher_reference"
    missing = "no_other_reference"

    def text(self, source: Source, others: Sequence[Source]) -> str | None:
        references = (other.rollout.problem.reference_solution for other in others)
        return next((text for text in references if text is not None), None)


class CritiqueContext(ContextClass):
    prompt = "teacher_critique"

    def text(self, source: Source, others: Sequence[Source]) -> str | None:
        return source.own.context


class ShuffledCritiqueContext(ContextClass):
    """The critique of the next rollout in the batch that is of another problem and has one."""

    prompt = "teacher_critique"
    missing = "no_other_critique"

    def text(self, source: Source, others: Sequence[Source]) -> str | None:
        contexts = (other.own.context for other in others)
        return next((text for text in contexts if text is not None), None)


class FullRepetitionContext(CritiqueContext):
    prompt = "teacher_full_repetition"
    mode = CritiqueMode.FULL_REPETITION


class OmissionContext(CritiqueContext):
    prompt = "teacher_omission"
    mode = CritiqueMode.OMISSION


CONTEXTS: Mapping[ContextKind, ContextClass] = {
    ContextKind.CRITIQUE: CritiqueContext(),
    ContextKind.REFERENCE: ReferenceContext(),
    ContextKind.NULL: NoContext(),
    ContextKind.OTHER_PROBLEM: OtherProblemContext(),
    ContextKind.SHUFFLED_CRITIQUE: ShuffledCritiqueContext(),
    ContextKind.FULL_REPETITION: FullRepetitionContext(),
    ContextKind.OMISSION: OmissionContext(),
}


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


def checked_critique(rollout: Rollout, checker: Checker, grader: Grader = answers_equal) -> Critique | None:
    """The exact checker's critique; None, and a line in the log, where it fails on this rollout.

    Raises ConfigError when it cannot handle the problem.
    """
    try:
        return trace_critique(rollout.problem, rollout.text, checker, grader)
    except GraderError as error:
        log.warning("no exact critique", rollout_id=rollout.rollout_id, error=str(error))
        return None


class Contexts:
    """Makes the contexts of one kind. ``checker`` says where errors are in arms without a critic; figures only.

    ``grader`` says whether the answers of its critiques are right.
    """

    def __init__(
        self,
        kind: ContextKind,
        critic: CritiqueSource | None,
        concurrency: int,
        checker: Checker | None = None,
        grader: Grader = answers_equal,
    ) -> None:
        """Raises ConfigError for critiques without a critic."""
        if kind.needs_critic and critic is None:
            raise ConfigError("critic.url is not set: give the address of a critic or of its load balancer")
        self.kind = kind
        self.critiques = Critiques(critic, concurrency) if kind.needs_critic and critic is not None else None
        self.checker = checker
        self.grader = grader

    async def fetch(self, rollouts: Sequence[Rollout]) -> list[ContextResult]:
        """One result per rollout, in order."""
        sources = await asyncio.gather(*(self._source(rollout) for rollout in rollouts))
        return [self._result(i, sources) for i in range(len(sources))]

    async def _source(self, rollout: Rollout) -> Source:
        if self.critiques is not None:
            return Source(rollout, await self.critiques.ask(rollout, CONTEXTS[self.kind].mode))
        if self.checker is not None:
            critique = await asyncio.to_thread(checked_critique, rollout, self.checker, self.grader)
            return Source(rollout, Critiqued(critique))
        return Source(rollout, Critiqued(None))

    def _result(self, index: int, sources: Sequence[Source]) -> ContextResult:
        source = sources[index]
        own = source.own
        if own.skip_reason is not None:
            return ContextResult(None, None, own.skip_reason, own.outcome)
        around = (*sources[index + 1 :], *sources[:index])
        others = [other for other in around if other.rollout.problem.id != source.rollout.problem.id]
        made = CONTEXTS[self.kind]
        text = made.text(source, others)
        if text is None:
            return ContextResult(None, own.critique, made.missing, own.outcome)
        return ContextResult(Context(kind=self.kind, text=text), own.critique, None, own.outcome)
