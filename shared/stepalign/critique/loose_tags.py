"""Tags as models write them: thinking, steps and answers, in any spelling and with closers missing or astray.

``<step>``, ``<step 1>``, ``<STEP_1>``, ``<step_1 attr="x">`` open a step, whatever the number; ``<answer>`` and
``<final_answer>`` the answer. A step ends at its closer, at the next opening tag, or where the text ends. A closer of
another number, or of nothing, is no tag: it is dropped. So are steps and answers without text, and what stands between
steps or before them. The first answer ends the attempt, unless nothing precedes it: then the steps follow it.

The strict grammar of this repository's solvers is :mod:`.trace`'s.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from stepalign.critique.sheet import Sheet
from stepalign.critique.trace import Span

_ATTRIBUTE = r"""[\w:.-]{1,40}+[ \t]*+=[ \t]*+(?:"[^"<>\n]{0,200}+"|'[^'<>\n]{0,200}+'|[^\s"'<>]{1,200}+)"""
_TAG = re.compile(
    r"<[ \t]{0,8}+(?P<close>/?)[ \t]{0,8}+(?:step(?:[ \t_#.:-]{0,8}+(?P<number>\d{1,6}+))?"
    rf"|(?P<answer>(?:final[ \t_-]?)?answer))(?:[ \t]++{_ATTRIBUTE}){{0,16}}+[ \t]{{0,8}}+/?>",
    re.I | re.A,
)
_THINKING = re.compile(r"<[ \t]{0,8}+(?P<close>/?)[ \t]{0,8}+(?:think(?:ing)?|thought)[ \t]{0,8}+>", re.I | re.A)


@dataclass(frozen=True)
class LooseSteps:
    """The tagged parts of a text. ``steps`` and ``answer`` are trimmed and not blank, and hold no tag.

    ``untagged`` is the text without its tags, for the rules that know none: up to the tagged answer, or after it where
    nothing precedes it. ``last_open``: the text ended in the last step.
    """

    steps: tuple[Sheet, ...]
    answer: Sheet | None
    untagged: Sheet
    last_open: bool


def contains_loose_tag(text: str) -> bool:
    """Whether the text holds a step or answer tag in any spelling."""
    return _TAG.search(text) is not None


def without_thinking(sheet: Sheet) -> Sheet:
    """Without ``<think>…</think>``; without its end where thinking never ends, and its begin where it never began."""
    thinking: list[Span] = []
    opened: int | None = None
    for tag in _THINKING.finditer(sheet.text):
        if not tag["close"]:
            opened = tag.start() if opened is None else opened
        elif opened is not None:
            thinking.append((opened, tag.end()))
            opened = None
        else:
            # The chat template had opened it.
            thinking = [(0, tag.end())]
    if opened is not None:
        thinking.append((opened, len(sheet.text)))
    return sheet.replaced((span, "\n\n") for span in thinking).trimmed() if thinking else sheet


def read_loose_tags(sheet: Sheet) -> LooseSteps:
    """Read a text without thinking. Linear in its length."""
    reader = _Reader(sheet)
    for tag in _TAG.finditer(sheet.text):
        if tag["close"]:
            reader.close(tag)
        else:
            reader.open(tag)
        if reader.answer is not None and reader.precedes:
            # An opening tag may have ended the answer.
            reader.opened = None
            break
    return reader.finished()


class _Reader:
    def __init__(self, sheet: Sheet) -> None:
        self.sheet = sheet
        self.steps: list[Sheet] = []
        self.answer: Sheet | None = None
        self.precedes = False
        """Whether text precedes the answer."""
        self.begin, self.end = 0, len(sheet.text)
        """Where text without tags is read from, and to."""
        self.opened: re.Match[str] | None = None
        self.strays: list[Span] = []
        """Closers inside the open step."""

    def open(self, tag: re.Match[str]) -> None:
        self._finish(tag.start(), tag.start())
        self.opened = tag

    def close(self, tag: re.Match[str]) -> None:
        opened = self.opened
        if opened is None:
            return
        ends = bool(opened["answer"]) == bool(tag["answer"])
        if ends and (not opened["number"] or not tag["number"] or int(opened["number"]) == int(tag["number"])):
            self._finish(tag.start(), tag.end())
        else:
            self.strays.append(tag.span())

    def _finish(self, end: int, after: int) -> None:
        """End the open step or answer at ``end``; its closer, if any, goes on to ``after``."""
        opened, strays = self.opened, self.strays
        self.opened, self.strays = None, []
        if opened is None:
            return
        start = opened.end()
        inside = self.sheet.part(start, end).replaced(((a - start, b - start), " ") for a, b in strays).trimmed()
        if not inside.text:
            return
        if not opened["answer"]:
            self.steps.append(inside)
        elif self.answer is None:
            self.answer = inside
            self.precedes = bool(self._without_tags(0, opened.start()).text)
            self.begin, self.end = (0, opened.start()) if self.precedes else (after, self.end)

    def _without_tags(self, start: int, end: int) -> Sheet:
        part = self.sheet.part(start, end)
        return part.replaced((tag.span(), " ") for tag in _TAG.finditer(part.text)).trimmed()

    def finished(self) -> LooseSteps:
        before = len(self.steps)
        # What stands open at the end is a step that breaks off, or an answer.
        self._finish(len(self.sheet.text), len(self.sheet.text))
        return LooseSteps(
            steps=tuple(self.steps),
            answer=self.answer,
            untagged=self._without_tags(self.begin, self.end),
            last_open=len(self.steps) > before,
        )
