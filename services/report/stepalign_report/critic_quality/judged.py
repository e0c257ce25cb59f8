"""One answer beside its label.

=============================== =====================================================================================
the critic says                 it calls wrong
=============================== =====================================================================================
``incorrect`` at a step         that step
``incorrect``, the answer alone the step that states the answer, which is where people label a wrong answer
``correct``                     no step
``unjustified``                 no step: it misses one, and calls those that are there right
``incomplete``                  no step: the attempt is right as far as it goes
a failure, or a refusal         nothing: it is wrong in every accuracy, and counted by reason
=============================== =====================================================================================

A critic numbers the steps that it reads. A step that is nothing but the answer is none of them, so its numbers may
differ from the label's; the spans of ``attempt.steps`` tell which of the sent steps each one is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stepalign.types import Critique, CritiqueResponse, Verdict
from stepalign_report.critic_quality.rows import Row
from stepalign_run.data import LabelledSolution

NO_STEP = -1


@dataclass(frozen=True)
class Judged:
    """A solution's label and what the critic called. Steps count from 0, −1 is no step."""

    id: str
    question: str
    """The same for all solutions of one question."""
    steps: int
    generator: str | None
    label: int
    called: int | None
    """None for a failure."""
    failure: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float
    probabilities: tuple[tuple[float, bool], ...] = ()
    """``p_wrong`` and the label of each step up to the first wrong one; steps after it have no label."""

    @property
    def is_right(self) -> bool:
        return self.called == self.label

    def is_right_over(self, threshold: float) -> bool:
        """Whether the first step with a ``p_wrong`` over ``threshold`` is the labelled one.

        That is what a critic in turns with this ``critic.wrong_threshold`` calls where it knows no answer.
        """
        if self.failure is not None:
            return False
        called = next((is_labelled for p, is_labelled in self.probabilities if p > threshold), None)
        return self.label == NO_STEP if called is None else called


def judge(solution: LabelledSolution, row: Row) -> Judged:
    """The row's answer beside the solution's label."""
    label = NO_STEP if solution.first_error is None else solution.first_error
    response = row.response
    called = failure = None
    if response is None:
        refusal = row.refusal
        failure = f"refused_{refusal.code or refusal.status}" if refusal is not None else "refused"
    elif response.critique is None:
        failure = response.failure.reason.value if response.failure is not None else "unknown"
    else:
        called = _called(response.critique, response, solution.steps)
    return Judged(
        id=solution.id,
        question=solution.question_key,
        steps=len(solution.steps),
        generator=solution.generator,
        label=label,
        called=called,
        failure=failure,
        prompt_tokens=None if response is None else response.usage.prompt_tokens,
        completion_tokens=None if response is None else response.usage.completion_tokens,
        seconds=row.seconds,
        probabilities=() if response is None else _probabilities(response, solution.steps, label),
    )


def _called(critique: Critique, response: CritiqueResponse, steps: Sequence[str]) -> int:
    if critique.verdict is not Verdict.INCORRECT:
        return NO_STEP
    if critique.first_error_step is not None:
        start, _ = response.attempt.steps[critique.first_error_step - 1]
        return _sent_step(steps, start)
    answer = response.attempt.answer
    return len(steps) - 1 if answer is None else _sent_step(steps, answer[0])


def _sent_step(steps: Sequence[str], place: int) -> int:
    """The step, from 0, that holds a code point of the steps joined by line breaks."""
    end = 0
    for index, step in enumerate(steps):
        end += len(step) + 1
        if place < end:
            return index
    raise ValueError(f"code point {place} is in none of {len(steps)} steps of {end} code points")


def _probabilities(response: CritiqueResponse, steps: Sequence[str], label: int) -> tuple[tuple[float, bool], ...]:
    if response.p_wrong is None:
        return ()
    places = [_sent_step(steps, start) for start, _ in response.attempt.steps]
    return tuple(
        (probability, place == label)
        for place, probability in zip(places, response.p_wrong, strict=True)
        if label == NO_STEP or place <= label
    )
