"""The wire types of processes and of other projects. Version: ``SCHEMA_VERSION``.

Validated at the boundary, trusted inside. Unknown fields are refused.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from stepalign.critique.splitting import AnswerRule, SplitAttempt, SplitRule, join_steps, split_attempt
from stepalign.critique.trace import Span, contains_tag
from stepalign.fields import JsonObject, ProblemId, Text, WellFormed

SCHEMA_VERSION = 1


class Wire(BaseModel):
    """Base of the wire types: immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Problem(Wire):
    """A question with a checkable answer. ``reference_solution`` is a worked solution in anybody's words."""

    id: ProblemId
    question: Text
    answer: Text
    reference_solution: WellFormed | None = None
    source: WellFormed | None = None
    metadata: JsonObject = Field(default_factory=dict)


class FinishReason(StrEnum):
    """Why a model's text ended."""

    STOP = "stop"
    """The model ended with EOS, which is the last completion token."""
    LENGTH = "length"
    """The budget ran out; there is no EOS."""


class Verdict(StrEnum):
    """The critique's four cases, A–D of the paper."""

    CORRECT = "correct"
    UNJUSTIFIED = "unjustified"
    INCOMPLETE = "incomplete"
    INCORRECT = "incorrect"


class StepStatus(StrEnum):
    """The relation of a critique's step to the attempt."""

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
    """The findings of validation. ``copied_steps`` includes those that differ by whitespace alone."""

    copied_steps: int
    whitespace_differences: int
    first_difference: Span | None
    """Span in the attempt as it was sent (code points) of the first segment that the critique does not copy, as the
    reading of the attempt gives it: a wrong or unfinished step, the step after the first insertion, or a wrong answer.
    None when all is copied."""


class Critique(Wire):
    """A validated step-aligned critique of one attempt.

    ``first_error_step`` counts the attempt's steps from 1. It is None for a correct or incomplete attempt, and for an
    incorrect one with no error but the answer (then ``answer_is_wrong``). For ``unjustified`` it is the attempt's
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
    ANSWER_UNKNOWN = "answer_unknown"
    """The grader cannot tell whether the critique's answer is the one that it must be."""
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
    """The maker of a critique.

    ``weights_revision`` covers the weights and the files beside them; ``settings`` is a digest of what else shapes its
    critiques, as decoding, grader, thresholds and limits. None of a critic that tells none.
    """

    model: str
    weights_revision: str
    prompt_version: str
    backend: str
    settings: str | None = None


class Usage(Wire):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int


class CritiqueMode(StrEnum):
    """The form of the context that is made from a validated critique. The last two are the paper's failing ones."""

    STEP_ALIGNED = "step_aligned"
    """Right steps copied, the first wrong one put right."""
    FULL_REPETITION = "full_repetition"
    """The wrong step quoted before its correction."""
    OMISSION = "omission"
    """Without the steps that are copied before the first change."""


# join_steps refuses a blank step, in better words than a pattern of pydantic's would. What is whitespace to Python is
# spelled out, since to JSON Schema's ``\s`` it is something else.
_NOT_BLANK = r"[^\t-\r\x1c- \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
SentStep = Annotated[WellFormed, Field(json_schema_extra={"pattern": _NOT_BLANK})]


_ONE_ATTEMPT: JsonDict = {
    "oneOf": [
        {"required": ["attempt"], "properties": {"attempt": {"type": "string"}, "steps": {"type": "null"}}},
        {"required": ["steps"], "properties": {"attempt": {"type": "null"}, "steps": {"type": "array"}}},
    ]
}
"""The check of :class:`CritiqueRequest`'s validator, in JSON Schema."""


class CritiqueRequest(Wire):
    """A request to the critic: an attempt as text, tagged or not, or as a list of steps.

    Untagged text is split by the rules of the field ``rule`` in the response. ``answer`` is the known answer, if any.
    """

    model_config = ConfigDict(json_schema_extra=_ONE_ATTEMPT)

    question: Annotated[WellFormed, Field(min_length=1)]
    attempt: WellFormed | None = None
    """Exactly one of ``attempt`` and ``steps``."""
    steps: Annotated[list[SentStep], Field(min_length=1)] | None = None
    reference_solution: WellFormed | None = None
    answer: SentStep | None = None
    """The known answer."""
    mode: CritiqueMode = CritiqueMode.STEP_ALIGNED

    @model_validator(mode="after")
    def _one_attempt(self) -> CritiqueRequest:
        if (self.attempt is None) == (self.steps is None):
            raise ValueError("send either attempt or steps")
        if self.steps is not None:
            join_steps(self.steps)
        if self.answer is not None and not self.answer.strip():
            raise ValueError("the known answer is blank; send null where there is none")
        if self.answer is not None and contains_tag(self.answer):
            raise ValueError("the known answer holds a step or answer tag; send what stands in it")
        return self

    def split(self) -> SplitAttempt:
        """The attempt as steps, by the rule that applies to it."""
        if self.steps is not None:
            return join_steps(self.steps)
        return split_attempt(self.attempt or "")


class AttemptReading(Wire):
    """How the attempt was read. Spans are code points of the sent attempt; sent steps count as joined by line breaks.

    By the rule ``tags`` a span covers its tags, by the others the text alone. ``tagged`` is the attempt as the critic
    read it, which copied steps equal; None when it was sent like that.
    """

    rule: SplitRule
    steps: list[Span]
    answer: Span | None
    answer_rule: AnswerRule | None
    tagged: str | None


class Forced(StrEnum):
    """A part of a critique that was settled whatever the critic's model would have written: by the known answer, or by
    a bound on what it writes."""

    ANSWER = "answer"
    """The critique's answer is the known one."""
    NO_ERROR = "no_error"
    """The attempt's answer is right, so no step was called wrong."""
    ERROR = "error"
    """The attempt's answer is wrong, so an error was placed where the model finds one likeliest."""
    STEP_BOUND = "step_bound"
    """A corrected, inserted or continued step was cut at its bound: it may break off amid a sentence."""
    ANSWER_BOUND = "answer_bound"
    """The answer was cut at its bound."""


Probability = Annotated[float, Field(ge=0, le=1)]


class CritiqueResponse(Wire):
    """A critique or a failure, never both: a model's unaligned answer is an answer, not an HTTP error."""

    id: str
    attempt: AttemptReading
    critique: Critique | None
    failure: CritiqueFailure | None
    context: str | None
    """The ready-made context of the mode that was asked for; None with a failure."""
    retried: FailureReason | None = None
    """Why a first answer of the critic was refused, when it was asked once more, and more strictly."""
    p_wrong: list[Probability] | None = None
    """For each step of the attempt, the probability that the critic's model calls it wrong, given that the steps
    before it are right. A model that is asked in turns knows of a wrong answer meanwhile (docs/critique.md); what is
    ``forced`` changes nothing in it. None where the backend does not tell."""
    forced: list[Forced] = Field(default_factory=list[Forced])
    """What the known answer or a bound settled, in the order of :class:`Forced`."""
    critic: CriticIdentity
    usage: Usage
    """Tokens of all answers that this one took."""

    @model_validator(mode="after")
    def _one_outcome(self) -> CritiqueResponse:
        if (self.critique is None) == (self.failure is None):
            raise ValueError("a response holds either a critique or a failure")
        if (self.critique is None) != (self.context is None):
            raise ValueError("a response with a critique holds its context, and only such a one")
        return self


REQUEST_TIMEOUT_HEADER = "x-request-timeout-ms"


MAX_REQUEST_TIMEOUT_MS = 3_600_000


class ErrorDetail(Wire):
    """Why a request, or one item of a batch, got no answer. ``param`` is the dotted path of the field to blame."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    """``server_error`` for every status from 500 on."""
    code: str
    param: str | None


class ErrorBody(Wire):
    """The envelope of every error of the service."""

    error: ErrorDetail


class CritiqueBatchItem(Wire):
    """The result of the item at ``index``, counted from 0. ``status`` is that of the same request on its own."""

    index: int
    status: int
    response: CritiqueResponse | None
    error: ErrorDetail | None

    @model_validator(mode="after")
    def _one_result(self) -> CritiqueBatchItem:
        if (self.response is None) == (self.error is None):
            raise ValueError("an item holds either a response or an error")
        return self


class CritiqueBatchResponse(Wire):
    """One item for each that was sent, in the order of the request."""

    items: list[CritiqueBatchItem]


class ModelInfo(Wire):
    """A served critic as OpenAI's model list describes one, and the maker of its critiques."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """When this process had it ready, in seconds since 1970."""
    owned_by: Literal["stepalign"] = "stepalign"
    weights_revision: str
    prompt_version: str
    backend: str
    settings: str | None = None


class ModelList(Wire):
    """The served critics, one by one."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]
