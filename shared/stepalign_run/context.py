"""Contexts: the texts that the self-teacher sees besides the question."""

from __future__ import annotations

from enum import StrEnum

from stepalign.types import Wire


class ContextKind(StrEnum):
    """Texts that the self-teacher sees besides the question. The trainer has a class for each, under the same name."""

    CRITIQUE = "critique"
    """The critique of this rollout."""
    REFERENCE = "reference"
    """The problem's reference solution."""
    NULL = "null"
    """Nothing: the teacher's prompt is the student's."""
    OTHER_PROBLEM = "other_problem"
    """The reference solution of another problem."""
    SHUFFLED_CRITIQUE = "shuffled_critique"
    """The critique of another problem's rollout."""
    FULL_REPETITION = "full_repetition"
    """The critique with the wrong step quoted before its correction."""
    OMISSION = "omission"
    """The critique without the steps that it copies before its first change."""

    @property
    def needs_critic(self) -> bool:
        """Whether the kind is made from a critic's critiques."""
        return self in (
            *(ContextKind.CRITIQUE, ContextKind.SHUFFLED_CRITIQUE),
            *(ContextKind.FULL_REPETITION, ContextKind.OMISSION),
        )


class Context(Wire):
    kind: ContextKind
    text: str
