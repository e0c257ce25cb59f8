"""The wire types: what travels between processes, and to other projects. Version: ``SCHEMA_VERSION``.

Validated at the boundary, trusted inside. Unknown fields are refused.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stepalign.trace import Span

SCHEMA_VERSION = 1

# ASCII, since ids travel in HTTP headers.
Identifier = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_.:/@+-]+$")]


class Wire(BaseModel):
    """Base of the wire types: immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Problem(Wire):
    """A question with a checkable answer. ``reference_solution`` is a worked solution in anybody's words."""

    id: Annotated[Identifier, Field(max_length=150)]
    question: Annotated[str, Field(min_length=1)]
    answer: Annotated[str, Field(min_length=1)]
    reference_solution: str | None = None
    source: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class SamplingParameters(Wire):
    """How completions are sampled. ``top_p = 1`` and ``top_k = 0`` switch the filters off."""

    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    max_new_tokens: Annotated[int, Field(ge=1)]
    seed: int


class FinishReason(StrEnum):
    STOP = "stop"
    """The model ended with EOS, which is the last completion token."""
    LENGTH = "length"
    """The budget ran out; there is no EOS."""


class Rollout(Wire):
    """One sampled solution. The token ids are the truth; ``text`` is their decoding without EOS, never re-tokenized.

    ``behaviour_logprobs`` are the natural-log probabilities of the completion tokens under the policy that sampled
    them, at the sampling temperature and after its filters.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: Identifier
    rollout_id: Identifier
    group_id: Identifier
    problem: Problem
    policy_version: Annotated[int, Field(ge=0)]
    prompt_token_ids: Annotated[list[int], Field(min_length=1)]
    completion_token_ids: Annotated[list[int], Field(min_length=1)]
    text: str
    finish_reason: FinishReason
    sampling: SamplingParameters
    behaviour_logprobs: list[float] | None = None
    traceparent: str | None = None

    @model_validator(mode="after")
    def _lengths_agree(self) -> Rollout:
        if self.behaviour_logprobs is not None and len(self.behaviour_logprobs) != len(self.completion_token_ids):
            raise ValueError("behaviour_logprobs must hold one value per completion token; none may be missing")
        return self


class Verdict(StrEnum):
    """The critique's four cases, A–D of the paper."""

    CORRECT = "correct"
    UNJUSTIFIED = "unjustified"
    INCOMPLETE = "incomplete"
    INCORRECT = "incorrect"


class StepStatus(StrEnum):
    COPIED = "copied"
    CORRECTED = "corrected"
    INSERTED = "inserted"
    CONTINUED = "continued"


class CritiqueStep(Wire):
    """One step of a critique. ``attempt_step`` is the position (from 1) of the attempt's step it stands for."""

    number: int
    body: str
    status: StepStatus
    attempt_step: int | None = None


class AlignmentReport(Wire):
    """What validation found. ``copied_steps`` includes those that differ by whitespace alone."""

    copied_steps: int
    whitespace_differences: int
    first_difference: Span | None
    """Span in the attempt (code points) of the first segment that the critique does not copy, tags included: a wrong
    or unfinished step, the step after the first insertion, or a wrong answer. None when all of it is copied."""


class Critique(Wire):
    """A validated step-aligned critique of one attempt.

    ``first_error_step`` counts the attempt's steps from 1. It is None for a correct or incomplete attempt, and for an
    incorrect one whose only error is the answer (then ``answer_is_wrong``). For ``unjustified`` it is the attempt's
    step before which a step was inserted; one past the last step when the insertion follows all of them.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    verdict: Verdict
    first_error_step: int | None
    answer_is_wrong: bool
    steps: list[CritiqueStep]
    answer: str
    alignment: AlignmentReport
    text: str
    """The ready-made context: the critique's steps and answer in the step-tagged grammar, without marks and verdict."""


class FailureReason(StrEnum):
    """Why a critique is refused. Every refusal is counted under one of these."""

    UNPARSEABLE = "unparseable"
    TRUNCATED = "truncated"
    NO_ANSWER = "no_answer"
    ANSWER_MISMATCH = "answer_mismatch"
    STEP_COUNT_MISMATCH = "step_count_mismatch"
    COPIED_STEP_ALTERED = "copied_step_altered"
    WRONG_STEP_QUOTED = "wrong_step_quoted"
    VERDICT_DISAGREES = "verdict_disagrees"


class CritiqueFailure(Wire):
    """A critic's answer that is no aligned critique. ``detail`` names the step or tag, ``text`` is the answer."""

    reason: FailureReason
    detail: str
    text: str


class CriticIdentity(Wire):
    """What made a critique: model name, revision of its weights, prompt set, backend."""

    model: str
    weights_revision: str
    prompt_version: str
    backend: str


class Usage(Wire):
    prompt_tokens: int
    completion_tokens: int


class CritiqueRequest(Wire):
    """What a project sends to the critic. ``attempt`` is step-tagged text; ``answer`` is the known answer, if any."""

    question: Annotated[str, Field(min_length=1)]
    attempt: str
    reference_solution: str | None = None
    answer: str | None = None


class CritiqueResponse(Wire):
    """A critique or a failure, never both: a model's unaligned answer is an answer, not an HTTP error."""

    id: str
    critique: Critique | None
    failure: CritiqueFailure | None
    critic: CriticIdentity
    usage: Usage

    @model_validator(mode="after")
    def _one_outcome(self) -> CritiqueResponse:
        if (self.critique is None) == (self.failure is None):
            raise ValueError("a response holds either a critique or a failure")
        return self


class ContextKind(StrEnum):
    """What the self-teacher sees besides the question."""

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


CRITIQUE_CONTEXTS = frozenset(
    {ContextKind.CRITIQUE, ContextKind.SHUFFLED_CRITIQUE, ContextKind.FULL_REPETITION, ContextKind.OMISSION}
)
"""The kinds that are made from a critic's critiques."""


class Context(Wire):
    kind: ContextKind
    text: str
