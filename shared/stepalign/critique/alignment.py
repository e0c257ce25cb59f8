"""Critic text → a validated :class:`~stepalign.types.Critique`, or a typed failure.

A critic writes the critique's steps in the step-tagged grammar, each followed by a mark that claims its status, then
the answer and one verdict tag. The marks make the alignment checkable: a step marked as copied must be copied::

    <step_1>…</step_1><copied/> <step_2>…</step_2><corrected/> … <answer>…</answer><verdict>incorrect</verdict>

Marks: ``copied`` | ``corrected`` | ``inserted`` | ``continued``. Verdicts and the marks that each demands:

- ``correct`` (case A): every step copied;
- ``unjustified`` (B): every step of the attempt copied, in order, with at least one step inserted;
- ``incomplete`` (C): the complete steps copied, then steps continued;
- ``incorrect`` (D): copied steps; one corrected step in the place of the first wrong one; then steps continued. Where
  the first error is the answer alone, or a step too many, nothing is corrected and the critique may end after the
  copies; an answer given too early is met by an inserted step in its place.

Rules. A copied step equals the attempt's step in number (B: apart from the shift) and body; a difference of whitespace
alone is accepted and counted; nothing else is ever mended with the attempt's text. The corrected step must not be the
wrong one again, nor open with it (:mod:`.quotation`). An unfinished step that the critique continues must be a prefix
of the continued one. Only a fully right attempt may have a critique without steps: "steps 1 to 3 are right" anchors
nothing. The answer must be there and be the known one; the verdict must not contradict the attempt.

Whether answers are the same is for a grader to say, which may not know. Unknown is neither equal nor different. An
attempt's answer that may or may not be the known one contradicts no verdict. The critique's own answer has to be known
to be the right one: where that is unknown, the critique is refused as ``answer_unknown``. The same words are equal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from stepalign.critique.answers import Grader, Judgement, answers_equal, judged
from stepalign.critique.quotation import is_quotation
from stepalign.critique.splitting import SplitAttempt
from stepalign.critique.trace import Span, TaggedAnswer, TaggedStep, Trace, TraceIssue, parse_trace
from stepalign.types import (
    AlignmentReport,
    Critique,
    CritiqueFailure,
    CritiqueStep,
    FailureReason,
    FinishReason,
    StepStatus,
    Verdict,
)

_MARK = re.compile(r"\s*<(copied|corrected|inserted|continued)/>")
_MARKS = {status.value: status for status in StepStatus}
_VERDICT = re.compile(r"\s*<verdict>\s*(correct|unjustified|incomplete|incorrect)\s*</verdict>\s*")


class _Refused(Exception):
    def __init__(self, reason: FailureReason, detail: str) -> None:
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class _Claim:
    """A parsed critique: its steps with their marks, its answer and its verdict."""

    steps: tuple[TaggedStep, ...]
    marks: tuple[StepStatus, ...]
    answer: TaggedAnswer
    verdict: Verdict
    text: str

    @property
    def copies(self) -> int:
        """How many steps, from the first, are marked as copied."""
        return next((i for i, mark in enumerate(self.marks) if mark is not StepStatus.COPIED), len(self.marks))

    def expect(self, marks: list[StepStatus], from_step: int, reason: str) -> None:
        if list(self.marks[from_step:]) != marks:
            found = ", ".join(self.marks[from_step:]) or "nothing"
            raise _Refused(
                FailureReason.UNPARSEABLE,
                f"{self.verdict} with steps marked {found} from step {from_step + 1}: {reason}",
            )


@dataclass(frozen=True)
class _Judge:
    """The known answer, if there is one, and what decides whether another is the same."""

    grader: Grader
    known: str | None

    def same(self, answer: str, other: str) -> Judgement:
        return judged(self.grader, answer, other)

    def is_known(self, answer: str) -> Judgement:
        return None if self.known is None else self.same(answer, self.known)


@dataclass
class _Alignment:
    steps: list[CritiqueStep] = field(default_factory=list[CritiqueStep])
    whitespace_differences: int = 0
    first_error_step: int | None = None
    answer_is_wrong: bool = False
    first_difference: Span | None = None

    def add(self, step: TaggedStep, status: StepStatus, attempt_step: int | None = None) -> None:
        self.steps.append(CritiqueStep(number=step.number, body=step.body, status=status, attempt_step=attempt_step))


def validate_critique(
    critic_text: str,
    attempt: str,
    *,
    known_answer: str | None = None,
    critic_finish_reason: FinishReason = FinishReason.STOP,
    grader: Grader = answers_equal,
) -> Critique | CritiqueFailure:
    """Check a critic's answer against the attempt. ``critic_text`` is the text after a reasoning critic's thinking.

    ``grader`` says whether answers are the same; one that fails does not know.
    """
    try:
        claim = _parse(critic_text, critic_finish_reason)
        alignment = _align(claim, parse_trace(attempt), _Judge(grader, known_answer))
    except _Refused as refused:
        return CritiqueFailure(reason=refused.reason, detail=refused.detail, text=critic_text)
    copied = sum(step.status is StepStatus.COPIED for step in alignment.steps)
    return Critique(
        verdict=claim.verdict,
        first_error_step=alignment.first_error_step,
        answer_is_wrong=alignment.answer_is_wrong,
        steps=alignment.steps,
        answer=claim.answer.body,
        alignment=AlignmentReport(
            copied_steps=copied,
            whitespace_differences=alignment.whitespace_differences,
            first_difference=alignment.first_difference,
        ),
        text=claim.text,
    )


def in_sent_text(critique: Critique, split: SplitAttempt) -> Critique:
    """A critique of ``split.tagged`` with its span in the attempt as it was sent."""
    found = critique.alignment.first_difference
    if found is None:
        return critique
    report = critique.alignment
    alignment = AlignmentReport(
        copied_steps=report.copied_steps,
        whitespace_differences=report.whitespace_differences,
        first_difference=split.span_in_text(found),
    )
    return critique.model_copy(update={"alignment": alignment})


def _parse(critic_text: str, finish_reason: FinishReason) -> _Claim:
    if finish_reason is FinishReason.LENGTH:
        raise _Refused(FailureReason.TRUNCATED, "the critic ran out of tokens")
    trace = parse_trace(critic_text)
    tolerated = {TraceIssue.OUTSIDE, TraceIssue.TRAILING, TraceIssue.NO_ANSWER}
    broken = [issue for issue in trace.issues if issue not in tolerated]
    if broken or not (trace.steps or trace.answer):
        raise _Refused(FailureReason.UNPARSEABLE, f"not in the step-tagged grammar: {', '.join(broken) or 'no tags'}")
    if trace.answer is None:
        raise _Refused(FailureReason.NO_ANSWER, "the critique has no <answer>…</answer>")
    marks, text = _parse_marks(critic_text, trace, trace.answer)
    end = trace.answer.span[1]
    match = _VERDICT.fullmatch(critic_text[end:])
    if match is None:
        raise _Refused(FailureReason.UNPARSEABLE, "after the answer there must be one <verdict>…</verdict> and no more")
    return _Claim(trace.steps, marks, trace.answer, Verdict(match[1]), text)


def _parse_marks(critic_text: str, trace: Trace, answer: TaggedAnswer) -> tuple[tuple[StepStatus, ...], str]:
    """The mark after each step, and the text without them; between steps there is nothing else.

    Marks are cut by position: a step's body may spell one.
    """
    starts = [part.span[0] for part in (*trace.steps, answer)]
    if critic_text[: starts[0]].strip():
        raise _Refused(FailureReason.UNPARSEABLE, "text stands before the first step")
    marks: list[StepStatus] = []
    parts: list[str] = []
    for step, following in zip(trace.steps, starts[1:], strict=True):
        start, end = step.span
        match = _MARK.match(critic_text, end)
        after = "" if match is None else critic_text[match.end() : following]
        if match is None or after.strip():
            raise _Refused(FailureReason.UNPARSEABLE, f"step {step.number} must be followed by exactly one mark")
        marks.append(_MARKS[match[1]])
        parts += (critic_text[start:end], after)
    start, end = answer.span
    return tuple(marks), "".join([*parts, critic_text[start:end]])


def _align(claim: _Claim, attempt: Trace, judge: _Judge) -> _Alignment:
    rule = {
        Verdict.CORRECT: _align_correct,
        Verdict.UNJUSTIFIED: _align_unjustified,
        Verdict.INCOMPLETE: _align_incomplete,
        Verdict.INCORRECT: _align_incorrect,
    }[claim.verdict]
    alignment = rule(claim, attempt, judge)
    if judge.known is None:
        return alignment
    same = judge.is_known(claim.answer.body)
    if same is None:
        raise _unknown(claim.answer.body, judge.known)
    if not same:
        raise _Refused(FailureReason.ANSWER_MISMATCH, f"answers {claim.answer.body!r}, known is {judge.known!r}")
    return alignment


def _unknown(answer: str, other: str) -> _Refused:
    said = f"answers {answer!r}, and whether that is {other!r} is unknown; write it as {other!r}"
    return _Refused(FailureReason.ANSWER_UNKNOWN, said)


def _copy(alignment: _Alignment, ours: TaggedStep, theirs: TaggedStep, position: int, *, shifted: bool = False) -> None:
    same_words = ours.body == theirs.body or ours.body.split() == theirs.body.split()
    if not same_words or not theirs.closed or (ours.number != theirs.number and not shifted):
        raise _Refused(FailureReason.COPIED_STEP_ALTERED, f"step {position} is not the attempt's step, verbatim")
    alignment.whitespace_differences += ours.body != theirs.body
    alignment.add(ours, StepStatus.COPIED, position)


def _copy_first(alignment: _Alignment, claim: _Claim, attempt: tuple[TaggedStep, ...], count: int) -> None:
    """The first ``count`` steps of the attempt, of which the critique has neither more nor fewer copies in front."""
    if claim.copies != count or len(attempt) < count:
        raise _Refused(
            FailureReason.STEP_COUNT_MISMATCH,
            f"copies {claim.copies} steps in front, the attempt has {count} to be copied",
        )
    for position in range(count):
        _copy(alignment, claim.steps[position], attempt[position], position + 1)


def _accepts_answer(claim: _Claim, attempt: Trace, judge: _Judge) -> TaggedAnswer:
    """Cases A and B say that the attempt's answer is right."""
    if attempt.answer is None:
        raise _Refused(FailureReason.VERDICT_DISAGREES, f"says {claim.verdict}, the attempt has no answer")
    if judge.is_known(attempt.answer.body) is False:
        raise _Refused(FailureReason.VERDICT_DISAGREES, f"says {claim.verdict}, the attempt's answer is wrong")
    same = judge.same(claim.answer.body, attempt.answer.body)
    if same is None and judge.known is None:
        raise _unknown(claim.answer.body, attempt.answer.body)
    if same is False:
        raise _Refused(FailureReason.VERDICT_DISAGREES, f"says {claim.verdict} and gives another answer")
    return attempt.answer


def _align_correct(claim: _Claim, attempt: Trace, judge: _Judge) -> _Alignment:
    alignment = _Alignment()
    _accepts_answer(claim, attempt, judge)
    _copy_first(alignment, claim, attempt.steps, len(attempt.steps))
    claim.expect([], claim.copies, "every step must be copied")
    return alignment


def _align_unjustified(claim: _Claim, attempt: Trace, judge: _Judge) -> _Alignment:
    alignment = _Alignment()
    answer = _accepts_answer(claim, attempt, judge)
    copied = 0
    for ours, mark in zip(claim.steps, claim.marks, strict=True):
        if mark is StepStatus.INSERTED:
            if alignment.first_error_step is None:
                alignment.first_error_step = copied + 1
            alignment.add(ours, mark)
        elif mark is StepStatus.COPIED and copied < len(attempt.steps):
            copied += 1
            _copy(alignment, ours, attempt.steps[copied - 1], copied, shifted=copied < ours.number)
        else:
            raise _Refused(FailureReason.STEP_COUNT_MISMATCH, f"step {ours.number} stands for no step of the attempt")
    if copied < len(attempt.steps) or alignment.first_error_step is None:
        raise _Refused(
            FailureReason.STEP_COUNT_MISMATCH,
            f"copies {copied} of {len(attempt.steps)} steps and inserts {len(claim.steps) - copied}",
        )
    place = alignment.first_error_step - 1
    alignment.first_difference = attempt.steps[place].span if place < len(attempt.steps) else answer.span
    return alignment


def _align_incomplete(claim: _Claim, attempt: Trace, judge: _Judge) -> _Alignment:
    alignment = _Alignment()
    if attempt.answer is not None:
        raise _Refused(FailureReason.VERDICT_DISAGREES, "says incomplete, the attempt has an answer")
    complete = attempt.complete_steps
    _copy_first(alignment, claim, complete, len(complete))
    rest = claim.steps[len(complete) :]
    claim.expect([StepStatus.CONTINUED] * len(rest), len(complete), "what follows the copies must be continued")
    if not claim.steps:
        raise _Refused(FailureReason.STEP_COUNT_MISMATCH, "the critique has no step")
    unfinished = attempt.unfinished
    if unfinished is not None:
        _continue(rest, unfinished)
        alignment.first_difference = unfinished.span
    for offset, step in enumerate(rest):
        stands_for = len(complete) + 1 if unfinished is not None and offset == 0 else None
        alignment.add(step, StepStatus.CONTINUED, stands_for)
    return alignment


def _continue(rest: tuple[TaggedStep, ...], unfinished: TaggedStep) -> None:
    if not rest:
        raise _Refused(FailureReason.STEP_COUNT_MISMATCH, "the attempt's unfinished step is not continued")
    written = " ".join(unfinished.body.split())
    if unfinished.number != rest[0].number or not " ".join(rest[0].body.split()).startswith(written):
        raise _Refused(
            FailureReason.COPIED_STEP_ALTERED, f"step {rest[0].number} does not begin with the unfinished step"
        )


def _align_incorrect(claim: _Claim, attempt: Trace, judge: _Judge) -> _Alignment:
    alignment = _Alignment()
    kept = claim.copies
    # An unfinished step that is called wrong is corrected; it is never one of the copies.
    _copy_first(alignment, claim, attempt.complete_steps[:kept], kept)
    rest = claim.steps[kept:]
    if kept < len(attempt.steps):
        wrong = attempt.steps[kept]
        claim.expect(_then_continued(StepStatus.CORRECTED, len(rest)), kept, "the wrong step must be corrected")
        if rest:
            _refuse_quotation(rest[0], wrong)
        elif kept == 0 or kept < len(attempt.steps) - 1:
            raise _Refused(FailureReason.STEP_COUNT_MISMATCH, f"step {kept + 1} is neither copied nor corrected")
        alignment.first_error_step = kept + 1
        alignment.first_difference = wrong.span
    else:
        claim.expect(_then_continued(StepStatus.INSERTED, len(rest)), kept, "only a missing step may follow the copies")
        if not claim.steps:
            raise _Refused(FailureReason.STEP_COUNT_MISMATCH, "the critique has no step")
        alignment.first_difference = _wrong_answer(claim, attempt, judge).span
        alignment.answer_is_wrong = True
    for offset, step in enumerate(rest):
        stands_for = kept + 1 if offset == 0 and kept < len(attempt.steps) else None
        alignment.add(step, claim.marks[kept + offset], stands_for)
    return alignment


def _then_continued(first: StepStatus, count: int) -> list[StepStatus]:
    return [first, *[StepStatus.CONTINUED] * (count - 1)] if count else []


def _refuse_quotation(ours: TaggedStep, wrong: TaggedStep) -> None:
    # A step may be wrong by its number or a missing tag alone: then its words may stand again.
    if wrong.closed and ours.number == wrong.number and is_quotation(ours.body, wrong.body):
        raise _Refused(FailureReason.WRONG_STEP_QUOTED, f"step {ours.number} repeats the step that it calls wrong")


def _wrong_answer(claim: _Claim, attempt: Trace, judge: _Judge) -> TaggedAnswer:
    if attempt.answer is None:
        raise _Refused(FailureReason.VERDICT_DISAGREES, "says incorrect; the attempt is right as far as it goes")
    right = judge.known if judge.known is not None else claim.answer.body
    if judge.same(attempt.answer.body, right):
        raise _Refused(FailureReason.VERDICT_DISAGREES, "says incorrect, copies every step, and the answer is right")
    return attempt.answer
