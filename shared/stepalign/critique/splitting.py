"""Attempts of solvers that write no step tags → steps, by one stated rule, with spans that point into the sent text.

The first rule that applies is used, and named in the result:

==================  ===================================================================================================
``tags``            The text holds a tag of the step-tagged grammar (:mod:`.trace`); it stays as it is.
``numbered_lines``  Lines open with ``1.``, ``2)``, ``Step 3:`` or ``**Step 4**`` and count 1, 2, 3, … without a gap,
                    at least to 2. A step runs to the next such line; the number is no part of it. Text before the
                    first one belongs to step 1.
``paragraphs``      Blank lines part the text into at least two blocks.
``lines``           There are at least two lines that are not blank.
``sentences``       All other text: sentences end with ``.``, ``!`` or ``?``, closing quotes and brackets included,
                    before whitespace that no lower-case letter follows. Decimal points and a few abbreviations end
                    none. One sentence is one step.
==================  ===================================================================================================

The final answer is the last ``\\boxed{…}``; else the text after ``####`` on the last such line; else the text after
the last ``answer is`` or ``answer:`` on its line. A step that is nothing but the answer becomes the answer and is no
step. Without any of them the attempt has no answer: it counts as one that breaks off.

Spans are half-open ``(start, end)`` in code points.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from stepalign.critique.trace import Span, contains_tag, parse_trace


class SplitRule(StrEnum):
    """The rule by which an attempt was split into steps: see the module's table."""

    TAGS = "tags"
    STEPS = "steps"
    """The request held the steps one by one."""
    NUMBERED_LINES = "numbered_lines"
    PARAGRAPHS = "paragraphs"
    LINES = "lines"
    SENTENCES = "sentences"


class AnswerRule(StrEnum):
    """The rule by which the final answer was found."""

    TAG = "tag"
    BOXED = "boxed"
    HASHES = "hashes"
    PHRASE = "phrase"


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
    """Where each step stands in ``text``; tags included where they were sent."""
    answer: Span | None
    answer_rule: AnswerRule | None

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
        found = next((segment.sent for segment in self.segments if segment.tagged == tagged_span), None)
        if found is None:
            raise ValueError(f"{tagged_span} is the span of no step or answer")
        return found


_MARKER = re.compile(r"^[ \t]*(?:\*\*)?(?:step\s+)?(\d{1,3})(?:\*\*)?[.:)](?:\*\*)?(?=\s|$)[ \t]*", re.I | re.M)
_BARE_MARKER = re.compile(r"^[ \t]*(?:\*\*|#{1,6}[ \t]+)step\s+(\d{1,3})(?:\*\*)?[ \t]*$", re.I | re.M)
_BLANK = re.compile(r"\n[ \t]*\n\s*")
# Texts are hostile: possessive quantifiers keep every pattern linear.
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++[\"'”’)\]]*+(?=\s++[^\sa-z]|\s*+$)")
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|cf|vs|approx|resp|eq|fig|no|dr|mr|mrs|ms|st)\.$", re.I)
_LONGEST_ABBREVIATION = len(" approx.")
_LIST_NUMBER = re.compile(r"\s*\d{1,3}\.")
_BRACE = re.compile(r"(\\boxed\s*+)?\{|\}")
_HASHES = re.compile(r"^[ \t]*+####(.++)$", re.M)
_PHRASE = re.compile(r"\banswer(?:\s++is\b\s*+:?|\s*+[:=])(.++)$", re.I | re.M)
_WRAPPING = re.compile(r"[\s*_$.!]++")
_ONLY_ANSWER = re.compile(
    r"(?:therefore|so|thus|hence)?[\s,]*+(?:the\s++)?(?:final\s++)?(?:answer(?:\s++is)?)?[\s:=*_$.!#]*+", re.I
)


# The service reads the attempt of a request more than once.
@lru_cache(maxsize=64)
def split_attempt(text: str) -> SplitAttempt:
    """Read an attempt as it was sent. Every text has a result; a blank one has no steps."""
    if contains_tag(text):
        trace = parse_trace(text)
        return SplitAttempt(
            text=text,
            tagged=text,
            rule=SplitRule.TAGS,
            steps=tuple(step.span for step in trace.steps),
            answer=trace.answer.span if trace.answer is not None else None,
            answer_rule=AnswerRule.TAG if trace.answer is not None else None,
        )
    rule, spans = _segments(text)
    return _assembled(text, rule, spans)


def join_steps(steps: Sequence[str]) -> SplitAttempt:
    """An attempt sent step by step; ``text`` joins the steps by line breaks.

    Raises ValueError when a step is blank or holds a tag of the step-tagged grammar.
    """
    return _joined(tuple(steps))


@lru_cache(maxsize=64)
def _joined(steps: tuple[str, ...]) -> SplitAttempt:
    for number, step in enumerate(steps, start=1):
        if not step.strip():
            raise ValueError(f"step {number} is blank")
        if contains_tag(step):
            raise ValueError(f"step {number} holds a step or answer tag; send tagged text as the attempt")
    text = "\n".join(steps)
    spans: list[Span] = []
    start = 0
    for step in steps:
        spans.append((start, start + len(step)))
        start += len(step) + 1
    return _assembled(text, SplitRule.STEPS, spans)


def _assembled(text: str, rule: SplitRule, spans: Sequence[Span]) -> SplitAttempt:
    stripped = [trimmed for span in spans if (trimmed := _trim(text, span)) is not None]
    answer, answer_rule = _find_answer(text)
    steps = [span for span in stripped if answer is None or not _is_only_answer(text, span, answer)]
    parts = [f"<step_{i}>{text[start:end]}</step_{i}>" for i, (start, end) in enumerate(steps, start=1)]
    if answer is not None:
        parts.append(f"<answer>{text[slice(*answer)]}</answer>")
    return SplitAttempt(
        text=text, tagged="\n".join(parts), rule=rule, steps=tuple(steps), answer=answer, answer_rule=answer_rule
    )


def _trim(text: str, span: Span) -> Span | None:
    """The span without whitespace around it; None when nothing is left."""
    piece = text[slice(*span)]
    if not piece.strip():
        return None
    return span[0] + len(piece) - len(piece.lstrip()), span[1] - (len(piece) - len(piece.rstrip()))


def _segments(text: str) -> tuple[SplitRule, list[Span]]:
    numbered = _numbered(text)
    if numbered:
        return SplitRule.NUMBERED_LINES, numbered
    for rule, separator in ((SplitRule.PARAGRAPHS, _BLANK), (SplitRule.LINES, re.compile(r"\n"))):
        spans = [span for span in _between(text, separator) if text[slice(*span)].strip()]
        if len(spans) > 1:
            return rule, spans
    return SplitRule.SENTENCES, _sentences(text)


def _numbered(text: str) -> list[Span]:
    found = sorted([*_MARKER.finditer(text), *_BARE_MARKER.finditer(text)], key=lambda match: match.start())
    chosen: list[re.Match[str]] = []
    for match in found:
        if int(match[1]) == len(chosen) + 1:
            chosen.append(match)
        elif int(match[1]) != len(chosen):
            return []
    if len(chosen) < 2:
        return []
    starts = [match.end() for match in chosen]
    ends = [match.start() for match in chosen[1:]] + [len(text)]
    if text[: chosen[0].start()].strip():
        starts[0] = 0
    return list(zip(starts, ends, strict=True))


def _between(text: str, separator: re.Pattern[str]) -> list[Span]:
    spans: list[Span] = []
    start = 0
    for match in separator.finditer(text):
        spans.append((start, match.start()))
        start = match.end()
    return [*spans, (start, len(text))]


def _sentences(text: str) -> list[Span]:
    spans: list[Span] = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        end = match.end()
        numbered = end - start < _LONGEST_ABBREVIATION and _LIST_NUMBER.fullmatch(text, start, end)
        if match[0] == "." and (numbered or _ABBREVIATION.search(text, max(start, end - _LONGEST_ABBREVIATION), end)):
            continue
        spans.append((start, match.end()))
        start = match.end()
    return [*spans, (start, len(text))]


def _find_answer(text: str) -> tuple[Span | None, AnswerRule | None]:
    for rule, spans in (
        (AnswerRule.BOXED, _boxed(text)),
        (AnswerRule.HASHES, [match.span(1) for match in _HASHES.finditer(text)]),
        (AnswerRule.PHRASE, [match.span(1) for match in _PHRASE.finditer(text)]),
    ):
        bare = [span for found in spans if (span := _unwrapped(text, found)) is not None]
        if bare:
            return bare[-1], rule
    return None, None


def _boxed(text: str) -> list[Span]:
    """The inside of each balanced ``\\boxed{…}``."""
    if "\\boxed" not in text:
        return []
    spans: list[Span] = []
    opened: list[re.Match[str]] = []
    for match in _BRACE.finditer(text):
        if match[0] != "}":
            opened.append(match)
        elif opened and (opening := opened.pop())[1] is not None:
            spans.append((opening.end(), match.start()))
    return spans


def _unwrapped(text: str, span: Span) -> Span | None:
    """Without the emphasis, dollar signs and full stops around it; None when nothing is left."""
    start, end = span
    opening = _WRAPPING.match(text, start, end)
    start = opening.end() if opening is not None else start
    while end > start and _WRAPPING.fullmatch(text, end - 1, end):
        end -= 1
    return (start, end) if start < end else None


def _is_only_answer(text: str, span: Span, answer: Span) -> bool:
    """Whether the segment holds the answer and besides it only words that announce it."""
    start, end = span
    if not (start <= answer[0] and answer[1] <= end):
        return False
    before = re.sub(r"\\boxed\s*\{$", "", text[start : answer[0]])
    after = text[answer[1] : end]
    return _ONLY_ANSWER.fullmatch(before) is not None and re.fullmatch(r"[\s*_$.!}]*", after) is not None
