"""Attempts as models and people write them → steps and the answer, by one stated rule, with spans into the sent text.

Read first: line ends become line feeds and characters that show nothing are dropped (:mod:`.sheet`); thinking,
``<think>…</think>``, is no part of the attempt, finished or not (:mod:`.loose_tags`).

The first rule that applies is used, and named in the result:

==================  ===================================================================================================
``tags``            The text is in the step-tagged grammar (:mod:`.trace`), or breaks off in it. It stays as it is.
``repaired_tags``   The text has step tags in any spelling (:mod:`.loose_tags`). It is written anew in the grammar.
``numbered_lines``  Lines or headings are numbered 1, 2, 3, … (:mod:`.markers`). A blank line parts what precedes them.
``paragraphs``      Blank lines part the text into at least two blocks.
``lines``           There are at least two lines that are not blank.
``sentences``       All other text: sentences end with ``.``, ``!`` or ``?``, closing quotes and brackets included,
                    before whitespace that no lower-case letter follows. Decimal points and a few abbreviations end
                    none. One sentence is one step.
==================  ===================================================================================================

Code, displayed mathematics and tables are never split (:mod:`.blocks`).

The answer is that of the ``<answer>`` tag; else :mod:`.final_answer` looks for it. Without any the attempt counts as
one that breaks off. A line or sentence that is nothing but the answer becomes the answer and is no step. So does a
paragraph or a numbered step that only marks it (``**Answer:** 7``), but not one that says it in a sentence. Steps that
were sent one by one all stay.

Spans are half-open ``(start, end)`` in code points.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from stepalign.critique.final_answer import find_answer, is_only_answer
from stepalign.critique.loose_tags import LooseSteps, contains_loose_tag, read_loose_tags, without_thinking
from stepalign.critique.rules import AnswerRule, SplitRule
from stepalign.critique.sheet import Sheet, normalised
from stepalign.critique.structure import split_untagged
from stepalign.critique.trace import Span, Trace, TraceIssue, parse_trace

__all__ = ["AnswerRule", "Segment", "SplitAttempt", "SplitRule", "join_steps", "split_attempt"]

_BROKEN_OFF = {TraceIssue.UNCLOSED, TraceIssue.NO_ANSWER}
_IN_SENTENCES = {SplitRule.LINES, SplitRule.SENTENCES}


class Segment(NamedTuple):
    """A step or the answer: where it stands in the sent text and in the tagged one, there with and without its tags."""

    sent: Span
    tagged: Span
    tagged_body: Span


class SplitAttempt(BaseModel):
    """An attempt as steps. ``text`` is the sent text, ``tagged`` the same with step tags, as a critic reads it."""

    model_config = ConfigDict(frozen=True)

    text: str
    tagged: str
    rule: SplitRule
    steps: tuple[Span, ...]
    """Where each step stands in ``text``; by the rule ``tags`` with its tags."""
    answer: Span | None
    answer_rule: AnswerRule | None
    starts: tuple[int, ...] = Field(repr=False)
    """Places in ``tagged``, from each of which it goes on as ``text`` does from the same place of ``origins``."""
    origins: tuple[int, ...] = Field(repr=False)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Steps and answer, in the order of ``tagged``."""
        trace = parse_trace(self.tagged)
        found = [
            Segment(sent=sent, tagged=step.span, tagged_body=step.body_span)
            for sent, step in zip(self.steps, trace.steps, strict=True)
        ]
        if self.answer is not None and trace.answer is not None:
            found.append(Segment(self.answer, trace.answer.span, trace.answer.body_span))
        return tuple(found)

    def span_in_text(self, tagged_span: Span) -> Span:
        """The span in ``text`` of a step or answer of ``tagged``, given by its span there, tags included.

        Raises ValueError when it is neither.
        """
        trace = parse_trace(self.tagged)
        for sent, step in zip(self.steps, trace.steps, strict=True):
            if step.span == tagged_span:
                return sent
        if self.answer is None or trace.answer is None or trace.answer.span != tagged_span:
            raise ValueError(f"{tagged_span} is the span of no step or answer")
        return self.answer

    def place_in_text(self, segment: Segment, place: int) -> int:
        """Where in ``text`` the character stands that ``segment`` has at ``place`` of ``tagged``.

        A tag that is not in the span sent lies at the segment's first character or at its last.
        """
        if self.rule is not SplitRule.TAGS:
            place = min(max(place, segment.tagged_body[0]), segment.tagged_body[1] - 1)
        run = bisect_right(self.starts, place) - 1
        return min(self.origins[run] + place - self.starts[run], segment.sent[1] - 1)


# The service reads the attempt of a request more than once, and has many requests at a time.
@lru_cache(maxsize=256)
def split_attempt(text: str) -> SplitAttempt:
    """Read an attempt as it was sent. Every text has a result; a blank one has no steps."""
    sheet = normalised(text)
    trace = parse_trace(sheet.text)
    if not trace.well_formed:
        sheet = without_thinking(sheet)
        trace = parse_trace(sheet.text)
    if trace.well_formed or (trace.steps and trace.answer is not None and set(trace.issues) == {TraceIssue.TRAILING}):
        end = trace.answer.span[1] if trace.answer is not None and trace.issues else len(sheet.text)
        return _as_tagged(text, sheet.part(0, end))
    loose = read_loose_tags(sheet)
    # Who writes tags has one for the answer too: without it the text breaks off, whatever its last sentence says.
    found, rule = (
        (None, AnswerRule.TAG)
        if loose.answer is not None
        else find_answer(loose.untagged.text, conclusions=not loose.steps)
    )
    if found is None and loose.answer is None and _breaks_off(trace, loose):
        return _as_tagged(text, sheet)
    if loose.steps:
        answer = loose.untagged.part(*found) if found is not None else loose.answer
        return _assembled(text, SplitRule.REPAIRED_TAGS, loose.steps, answer, rule, open_end=loose.last_open)
    return _untagged(text, loose, found, rule)


def join_steps(steps: Sequence[str]) -> SplitAttempt:
    """An attempt sent step by step; ``text`` joins the steps by line breaks. Every step stays one.

    Raises ValueError when a step is blank or holds a tag of the step-tagged grammar, in whatever spelling.
    """
    return _joined(tuple(steps))


@lru_cache(maxsize=256)
def _joined(steps: tuple[str, ...]) -> SplitAttempt:
    read: list[Sheet] = []
    start = 0
    for number, step in enumerate(steps, start=1):
        sheet = normalised(step).trimmed()
        # A step of characters that show nothing is still a step.
        sheet = sheet if sheet.text else Sheet(step).trimmed()
        if not sheet.text:
            raise ValueError(f"step {number} is blank")
        if contains_loose_tag(sheet.text):
            raise ValueError(f"step {number} holds a step or answer tag; send tagged text as the attempt")
        read.append(sheet.moved(start))
        start += len(step) + 1
    text = "\n".join(steps)
    whole = without_thinking(normalised(text))
    answer, rule = find_answer(whole.text)
    return _assembled(text, SplitRule.STEPS, read, whole.part(*answer) if answer is not None else None, rule)


def _breaks_off(trace: Trace, loose: LooseSteps) -> bool:
    """Whether the text is in the grammar as far as it goes: its steps are closed, but for the last, where it ends."""
    whole = all(step.closed for step in trace.complete_steps) and set(trace.issues) <= _BROKEN_OFF
    return bool(trace.steps) and whole and len(loose.steps) == sum(bool(step.body.strip()) for step in trace.steps)


def _as_tagged(text: str, sheet: Sheet) -> SplitAttempt:
    trace = parse_trace(sheet.text)
    return SplitAttempt(
        text=text,
        tagged=sheet.text,
        rule=SplitRule.TAGS,
        steps=tuple(sheet.part(*step.span).sent for step in trace.steps),
        answer=sheet.part(*trace.answer.span).sent if trace.answer is not None else None,
        answer_rule=AnswerRule.TAG if trace.answer is not None else None,
        starts=sheet.starts,
        origins=sheet.origins,
    )


def _untagged(text: str, loose: LooseSteps, found: Span | None, answer_rule: AnswerRule | None) -> SplitAttempt:
    sheet = loose.untagged
    rule, spans = split_untagged(sheet.text)
    if found is not None and rule is SplitRule.NUMBERED_LINES:
        spans[-1] = _without_last_mark(sheet.text, spans[-1], found)
    steps = [
        sheet.part(*span).trimmed()
        for span in spans
        if found is None or not is_only_answer(sheet.text, span, found, sentences=rule in _IN_SENTENCES)
    ]
    answer = sheet.part(*found) if found is not None else loose.answer
    return _assembled(text, rule, [step for step in steps if step.text], answer, answer_rule)


def _without_last_mark(text: str, span: Span, answer: Span) -> Span:
    """The last step of a numbered text without a last paragraph that only marks the answer."""
    start, end = span
    blank = text.rfind("\n\n", start, end)
    only_mark = blank >= 0 and is_only_answer(text, (blank, end), answer, sentences=False)
    return (start, blank) if only_mark and text[start:blank].strip() else span


def _assembled(
    text: str,
    rule: SplitRule,
    steps: Sequence[Sheet],
    answer: Sheet | None,
    answer_rule: AnswerRule | None,
    *,
    open_end: bool = False,
) -> SplitAttempt:
    parts: list[str] = []
    starts: list[int] = []
    origins: list[int] = []
    length = 0

    def write(opening: str, sheet: Sheet, closing: str) -> None:
        nonlocal length
        before = ("\n" if parts else "") + opening
        body = length + len(before)
        starts.extend(body + start for start in sheet.starts)
        origins.extend(sheet.origins)
        parts.append(before + sheet.text + closing)
        length += len(parts[-1])

    for i, step in enumerate(steps, start=1):
        breaks_off = open_end and answer is None and i == len(steps)
        write(f"<step_{i}>", step, "" if breaks_off else f"</step_{i}>")
    if answer is not None:
        write("<answer>", answer, "</answer>")
    return SplitAttempt(
        text=text,
        tagged="".join(parts),
        rule=rule,
        steps=tuple(step.sent for step in steps),
        answer=answer.sent if answer is not None else None,
        answer_rule=answer_rule if answer is not None else None,
        starts=tuple(starts),
        origins=tuple(origins),
    )
