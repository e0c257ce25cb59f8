"""The score of an arm, by the need of its objective: a teacher, or else rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepalign.critique.answers import Grader
from stepalign.critique.trace import Span
from stepalign.types import Critique
from stepalign_run.config import ArmSection
from stepalign_run.context import ContextKind
from stepalign_run.probing import ArmFigures, ContextFigures, Estimate
from stepalign_run.rollout import Rollout
from stepalign_trainer.batch.scope import TokenGroups, token_groups
from stepalign_trainer.objectives import make_objective
from stepalign_trainer.probe.figures import ScoredRollout, differing, estimate, focus, scaled


@dataclass(frozen=True)
class Subject:
    """A rollout and its known errors, under any teacher."""

    rollout: Rollout
    critique: Critique | None
    spans: list[Span]
    groups: TokenGroups
    """Of the scope ``through_first_error``."""


@dataclass(frozen=True)
class Measured:
    """A context's figures, and for each rollout the values that arms are scored from."""

    figures: ContextFigures
    subjects: list[Subject]
    scored: list[ScoredRollout]


def score_arm(
    name: str,
    arm: ArmSection,
    measured: Mapping[ContextKind, Measured],
    samples: Sequence[Sequence[Rollout]],
    grader: Grader,
) -> ArmFigures:
    """``samples`` are the student's own, of each problem."""
    if arm.needs.teacher:
        return _by_teacher(name, arm, measured[arm.context])
    given: dict[str, Any] = {"arm": name, "objective": arm.objective, "scope": arm.scope}
    given |= {"context": None, "solve_rate": None, "focus": None}
    if not arm.needs.rewards:
        return ArmFigures(**given, score=None, note="no prediction: there is neither a teacher nor a reward")
    score = _differing_groups(arm, samples, grader)
    return ArmFigures(**given, score=score, note=None if score else "the grader failed on too many samples")


def _by_teacher(name: str, arm: ArmSection, of_context: Measured) -> ArmFigures:
    given: dict[str, Any] = {"arm": name, "objective": arm.objective, "scope": arm.scope, "context": arm.context}
    rate = of_context.figures.solve_rate
    known = [subject.groups.first_error is not None for subject in of_context.subjects]
    if rate is None:
        return ArmFigures(**given, solve_rate=None, focus=None, score=None, note="no rollout can have this context")
    if not any(known):
        note = "no rollout with a known error: set data.checker, or use a critic whose critiques validate"
        return ArmFigures(**given, solve_rate=rate.value, focus=None, score=None, note=note)
    ends = [token_groups(arm.scope, s.rollout, s.critique, s.spans).in_scope for s in of_context.subjects]
    share = focus(of_context.scored, ends)
    note = "the teacher says what the student says: there is no loss" if share is None else None
    return ArmFigures(**given, solve_rate=rate.value, focus=share, score=scaled(rate, share or 0.0), note=note)


def _differing_groups(arm: ArmSection, samples: Sequence[Sequence[Rollout]], grader: Grader) -> Estimate | None:
    """The expected share of groups with differing rewards, over the problems with enough graded samples."""
    objective = make_objective(arm)
    chances: list[float] = []
    for of_problem in samples:
        rewards = [value for rollout in of_problem if (value := objective.reward(rollout, grader)) is not None]
        if len(rewards) >= arm.group_size:
            chances.append(differing(int(sum(rewards)), len(rewards), arm.group_size))
    return estimate(chances)
