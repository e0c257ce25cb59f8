"""A text without tags → where its steps stand, by the first rule of :mod:`.splitting`'s table that applies.

Blocks (:mod:`.blocks`) are never split. A heading of Markdown on a block or line of its own is no step.
"""

from __future__ import annotations

import re

from stepalign.critique.blocks import Blocks
from stepalign.critique.markers import BLANK, numbered
from stepalign.critique.rules import SplitRule
from stepalign.critique.trace import Span

# Texts are hostile: possessive quantifiers keep every pattern linear.
_LINE_END = re.compile(r"\n")
_HEADING = re.compile(r"\s*#{1,6}[ \t]++[^\n]++\s*")
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++[\"'”’)\]]*+(?=\s++[^\sa-z]|\s*+$)")
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|cf|vs|approx|resp|eq|fig|no|dr|mr|mrs|ms|st)\.$", re.I)
_LONGEST_ABBREVIATION = len(" approx.")
_LIST_NUMBER = re.compile(r"\s*\d{1,3}\.")


def split_untagged(text: str) -> tuple[SplitRule, list[Span]]:
    """The rule that applies, and spans that may have whitespace around them, or be blank."""
    blocks = Blocks(text)

    def paragraphs(start: int, end: int) -> list[Span]:
        return _pieces(text, BLANK, blocks, start, end)

    steps = numbered(text, blocks, paragraphs)
    if steps:
        return SplitRule.NUMBERED_LINES, steps
    for rule, separator in ((SplitRule.PARAGRAPHS, BLANK), (SplitRule.LINES, _LINE_END)):
        spans = _pieces(text, separator, blocks, 0, len(text))
        if len(spans) > 1:
            return rule, spans
    return SplitRule.SENTENCES, _sentences(text, blocks)


def _pieces(text: str, separator: re.Pattern[str], blocks: Blocks, start: int, end: int) -> list[Span]:
    """What stands between the separators and is not blank; headings only where there is nothing else."""
    spans: list[Span] = []
    for match in separator.finditer(text, start, end):
        if not blocks.hold(match.start()):
            spans.append((start, match.start()))
            start = match.end()
    spans = [span for span in [*spans, (start, end)] if text[slice(*span)].strip()]
    return [span for span in spans if _HEADING.fullmatch(text, *span) is None] or spans


def _sentences(text: str, blocks: Blocks) -> list[Span]:
    spans: list[Span] = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        end = match.end()
        numbered = end - start < _LONGEST_ABBREVIATION and _LIST_NUMBER.fullmatch(text, start, end)
        if match[0] == "." and (numbered or _ABBREVIATION.search(text, max(start, end - _LONGEST_ABBREVIATION), end)):
            continue
        if not blocks.hold(match.start()):
            spans.append((start, end))
            start = end
    return [*spans, (start, len(text))]
