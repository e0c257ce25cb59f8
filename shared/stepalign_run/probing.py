"""``stepalign probe``: the plan that its worker is given, and the report that it writes (``probe.json``).

Shares and rates are between 0 and 1, advantages and gains in nats. An undefined figure is None, never 0.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from stepalign.types import Wire
from stepalign_run.config.arm import ArmSection, ObjectiveName, Scope
from stepalign_run.context import ContextKind

Count = Annotated[int, Field(ge=0)]


class ProbePlan(Wire):
    """Names of the arms to probe, and the number of samples that each self-teacher draws for a rollout."""

    samples: Annotated[int, Field(ge=1)]
    arms: Annotated[dict[str, ArmSection], Field(min_length=1)]


class Estimate(Wire):
    """A mean and its 95 % interval."""

    value: float
    lower: float
    upper: float


class Contrast(Wire):
    """The advantage ``A_t = log p(teacher) − log p(student)`` of a rollout's tokens, mean over the tokens of a group.

    None where no token is in the group. ``below`` is the share of the correct tokens with ``A_t < −0.1``.
    """

    correct: float | None
    """Before the first error; all tokens of a rollout without one."""
    below: float | None
    at_error: float | None
    """The first-error token."""
    tail: float | None
    """After the error segment."""


class ContextFigures(Wire):
    """The effect of one kind of context on the self-teacher."""

    kind: ContextKind
    rollouts: Count
    """Rollouts that can have this context; the figures are over them."""
    left_out: dict[str, Count]
    """The others, by reason."""
    solve_rate: Estimate | None
    """How often the self-teacher that sees the context gives the right answer."""
    trace_rate: float | None
    """How often every step is right too; None without ``data.checker``."""
    grader_errors: Count
    """Samples that the grader failed on; they are in no rate."""
    solution_gain: float | None
    """Nats per token by which the context makes a correct solution more likely, mean over rollouts."""
    solutions: Count
    """Rollouts of which a correct solution is known: those in ``solution_gain``."""
    contrast: Contrast


class CritiqueFigures(Wire):
    """Numbers of critiques, by verdict and by reason of refusal."""

    rollouts: Count
    validated: dict[str, Count]
    refused: dict[str, Count]

    @property
    def share(self) -> float:
        """Of the critiques that validate."""
        return sum(self.validated.values()) / max(self.rollouts, 1)


class StudentFigures(Wire):
    """The student's own samples, at the solver's temperature, for the arms with rewards."""

    problems: Count
    samples: Count
    """Of each problem."""
    solve_rate: Estimate | None


class ArmFigures(Wire):
    """An arm and how promising it looks.

    ``focus`` is the share of the loss that lies in the error segments. ``score`` is solve rate × focus of a
    self-distillation arm, and the expected share of groups with differing rewards of a GRPO arm; None means that
    nothing is predicted, for the reason in ``note``.
    """

    arm: str
    objective: ObjectiveName
    context: ContextKind | None
    """None where there is no teacher."""
    scope: Scope
    solve_rate: float | None
    focus: float | None
    score: Estimate | None
    note: str | None = None


class ProbeReport(Wire):
    """``probe.json``. The same for the same seed, configuration, machine and thread count."""

    run: str
    seed: int
    rollouts: Count
    """Rollouts that are measured."""
    unusable: dict[str, Count]
    """Those that no update could use, by reason; nothing is measured on them."""
    with_error: Count
    """Rollouts with a known first error."""
    unlocated: Count
    """Rollouts without a valid critique, by the critic or the checker: nothing is known about where they err."""
    samples: Count
    contexts: list[ContextFigures]
    critiques: CritiqueFigures | None
    """None where no arm needs a critic."""
    student: StudentFigures | None
    """None without a GRPO arm."""
    arms: list[ArmFigures]
    """Best score first, those without one last."""
    terms: dict[str, Any]
    """Settings that a run must share for its figures to be comparable with these."""
    plan: ProbePlan
    config: dict[str, Any]
    versions: dict[str, str]
