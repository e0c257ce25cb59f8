"""Step-tagged text → steps with exact character spans, and the answer.

Grammar: ``<step_1>…</step_1> … <step_N>…</step_N><answer>…</answer>``. Every input has a stated result; nothing
raises. The rules for text that breaks the grammar, each recorded as a :class:`TraceIssue`:

==================  =================================================================================================
unclosed            A step ends where the next tag opens, or at the end of the text; ``closed`` is false.
nested              The closing tag of a step that an inner tag had ended; it stays plain text.
stray_close         A closing tag that matches nothing; it stays plain text.
repeated            A step number that was seen before; the step is kept, in text order.
out_of_order        A number lower than the one before it; the step is kept, in text order.
missing_number      A gap in the numbers, or a first step that is not 1.
empty               A step or an answer without text other than whitespace.
outside             Text other than whitespace between tags; it belongs to no step.
trailing            Text other than whitespace after the answer. The first closed answer ends the trace.
no_answer           No closed answer.
==================  =================================================================================================

Spans are half-open ``(start, end)`` in code points of the text that was parsed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

_TAG = re.compile(r"<(?P<close>/?)(?:step_(?P<number>[1-9][0-9]{0,5})|answer)>")

Span = tuple[int, int]


def contains_tag(text: str) -> bool:
    """Whether the text holds a step or answer tag, opening or closing."""
    return _TAG.search(text) is not None


class TraceIssue(StrEnum):
    """A breach of the grammar: see the module's table."""

    UNCLOSED = "unclosed"
    NESTED = "nested"
    STRAY_CLOSE = "stray_close"
    REPEATED = "repeated"
    OUT_OF_ORDER = "out_of_order"
    MISSING_NUMBER = "missing_number"
    EMPTY = "empty"
    OUTSIDE = "outside"
    TRAILING = "trailing"
    NO_ANSWER = "no_answer"


# Named tuples: nothing is left to be validated, and the service makes fifty of these for a request.
class TaggedStep(NamedTuple):
    """One step. ``span`` covers the tags, ``body_span`` only the body between them."""

    number: int
    body: str
    span: Span
    body_span: Span
    closed: bool = True


class TaggedAnswer(NamedTuple):
    """The tagged answer. ``body`` is stripped of surrounding whitespace, the spans are exact."""

    body: str
    span: Span
    body_span: Span


@dataclass(frozen=True)
class Trace:
    """A text parsed into steps. ``steps`` are in text order; the last one may be unclosed."""

    steps: tuple[TaggedStep, ...]
    answer: TaggedAnswer | None
    issues: tuple[TraceIssue, ...]

    @property
    def well_formed(self) -> bool:
        return not self.issues

    @property
    def complete_steps(self) -> tuple[TaggedStep, ...]:
        """All steps but an unfinished last one."""
        return self.steps[:-1] if self.unfinished is not None else self.steps

    @property
    def unfinished(self) -> TaggedStep | None:
        """The last step when the text ended inside it."""
        last = self.steps[-1] if self.steps else None
        return last if last is not None and not last.closed and self.answer is None else None


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.steps: list[TaggedStep] = []
        self.answer: TaggedAnswer | None = None
        self.issues: list[TraceIssue] = []
        self.numbers: set[int] = set()
        self.interrupted: set[int] = set()
        self.opened: re.Match[str] | None = None
        self.position = 0

    def outside(self, end: int) -> None:
        if self.text[self.position : end].strip():
            self.issues.append(TraceIssue.OUTSIDE)

    def finish_step(self, opened: re.Match[str], body_end: int, end: int, *, closed: bool) -> None:
        number = int(opened["number"])
        body = self.text[opened.end() : body_end]
        last = self.steps[-1].number if self.steps else 0
        if number in self.numbers:
            self.issues.append(TraceIssue.REPEATED)
        elif number < last:
            self.issues.append(TraceIssue.OUT_OF_ORDER)
        elif number != last + 1:
            self.issues.append(TraceIssue.MISSING_NUMBER)
        self.numbers.add(number)
        if not closed:
            self.interrupted.add(number)
            self.issues.append(TraceIssue.UNCLOSED)
        elif not body.strip():
            self.issues.append(TraceIssue.EMPTY)
        self.steps.append(TaggedStep(number, body, (opened.start(), end), (opened.end(), body_end), closed))

    def open(self, tag: re.Match[str]) -> None:
        if self.opened is None:
            self.outside(tag.start())
        elif self.opened["number"]:
            self.finish_step(self.opened, tag.start(), tag.start(), closed=False)
        else:
            self.issues.append(TraceIssue.UNCLOSED)
        self.opened = tag

    def close(self, tag: re.Match[str]) -> None:
        opened = self.opened
        if opened is None or opened["number"] != tag["number"]:
            nested = tag["number"] is not None and int(tag["number"]) in self.interrupted
            self.issues.append(TraceIssue.NESTED if nested else TraceIssue.STRAY_CLOSE)
            if opened is None:
                self.outside(tag.start())
                self.position = tag.end()
            return
        if opened["number"]:
            self.finish_step(opened, tag.start(), tag.end(), closed=True)
        else:
            body = self.text[opened.end() : tag.start()]
            if not body.strip():
                self.issues.append(TraceIssue.EMPTY)
            self.answer = TaggedAnswer(body.strip(), (opened.start(), tag.end()), (opened.end(), tag.start()))
        self.opened = None
        self.position = tag.end()

    def parse(self) -> Trace:
        for tag in _TAG.finditer(self.text):
            (self.close if tag["close"] else self.open)(tag)
            if self.answer is not None:
                break
        end = len(self.text)
        if self.answer is not None:
            if self.text[self.position :].strip():
                self.issues.append(TraceIssue.TRAILING)
        else:
            if self.opened is None:
                self.outside(end)
            elif self.opened["number"]:
                self.finish_step(self.opened, end, end, closed=False)
            else:
                self.issues.append(TraceIssue.UNCLOSED)
            self.issues.append(TraceIssue.NO_ANSWER)
        return Trace(steps=tuple(self.steps), answer=self.answer, issues=tuple(dict.fromkeys(self.issues)))


# Splitting, validation and the context each read the same attempt and the same answer. A service has many at a time.
@lru_cache(maxsize=256)
def parse_trace(text: str) -> Trace:
    """Parse a step-tagged text. Never raises; breaches of the grammar are listed in ``Trace.issues``."""
    return _Parser(text).parse()


def render_trace(bodies: list[str], answer: str | None = None, *, separator: str = "") -> str:
    """Write step bodies and an answer in the grammar that :func:`parse_trace` reads. Bodies are kept verbatim."""
    parts = [f"<step_{i}>{body}</step_{i}>" for i, body in enumerate(bodies, start=1)]
    if answer is not None:
        parts.append(f"<answer>{answer}</answer>")
    return separator.join(parts)
