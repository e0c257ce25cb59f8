"""Numbered steps: ``Step 1: …``, ``**Step 2** …``, ``## Step 3: Title``, ``4. …``, ``5) …``, and where each one ends.

A heading is no part of its step, unless nothing stands under it. A *title* is one on a line of its own, ``## Step 1:
Add`` or ``**Step 1: Add**``: it opens a section, and the section is the step.

Markers of one kind, counted 1, 2, 3, … without a gap and at least to 2, are the structure of a text when what they
number is at least half of it. Steps by name come before headings with a number, and these before lists. Of lists the
outermost counts alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

from stepalign.critique.blocks import Blocks
from stepalign.critique.trace import Span

BLANK = re.compile(r"\n[ \t]*\n\s*")
Split = Callable[[int, int], list[Span]]

# Texts are hostile: possessive quantifiers keep every pattern linear.
_NUMBER = r"(?P<word>step[ \t]++)?(?P<number>\d{1,3}+)"
_HASHED = re.compile(
    rf"^[ \t]*+(?P<hashes>\#{{1,6}})[ \t]++(?:\*\*|__)?{_NUMBER}(?![.:]?\d)(?P<stop>[.:)])?(?P<title>(?!\w)[^\n]*+)$",
    re.I | re.M,
)
_BOLD = re.compile(
    rf"^(?P<indent>[ \t]*+)(?P<bold>\*\*|__|\*)\(?{_NUMBER}(?:(?P<stop>[.:)])(?=\s|(?P=bold)))?(?P<title>(?!\w)[^\n]*?)"
    r"(?P=bold)(?P<after>[.:)])?[ \t]*+(?:[-–—](?=[ \t])[ \t]++)?",
    re.I | re.M,
)
_PLAIN = re.compile(
    rf"^(?P<indent>[ \t]*+)(?:\*\*)?\(?{_NUMBER}(?:(?P<stop>[.:)])(?=\s|$)[ \t]*+|[ \t]*+[-–—][ \t]++|[ \t]*+$)",
    re.I | re.M,
)
_HEADING = re.compile(r"^[ \t]*+(?:(?P<hashes>\#{1,6})[ \t]++|\*\*(?=\S))(?P<title>[^\n]++)$", re.M)
_AROUND_TITLE = " \t:.-–—*_"
_STEP, _HASHES, _LIST = range(3)
_MOST = 0.5


class _Kind(NamedTuple):
    """Markers of one kind count together."""

    family: int
    depth: int = 0
    stop: str = ""


class _Marker(NamedTuple):
    number: int
    start: int
    """Of its line."""
    body: int
    """Where the step's text begins."""
    title: Span | None
    """The words of a title; they are the step where nothing stands under them."""
    level: int
    """Hashes of the heading; 0 without."""
    kind: _Kind


def numbered(text: str, blocks: Blocks, paragraphs: Split) -> list[Span]:
    """The steps of a numbered text; none where its structure is another one.

    ``paragraphs`` splits what precedes the first marker, or follows a list, with a blank line between.
    """
    kinds: defaultdict[_Kind, list[_Marker]] = defaultdict(list)
    for marker in sorted(_markers(text, blocks), key=lambda marker: marker.start):
        kinds[marker.kind].append(marker)
    for family in (_STEP, _HASHES, _LIST):
        candidates = [markers for kind, markers in kinds.items() if kind.family == family and len(markers) > 1]
        if not candidates:
            continue
        chosen = _counted(min(candidates, key=lambda markers: (markers[0].kind.depth, markers[0].start)))
        if chosen and _end(text, chosen, blocks) - chosen[0].start >= _MOST * len(text.strip()):
            return _steps(text, chosen, blocks, paragraphs)
    return []


def _markers(text: str, blocks: Blocks) -> Iterable[_Marker]:
    seen: set[int] = set()
    for pattern, make, signs in ((_HASHED, _hashed, "#"), (_BOLD, _bold, "*_"), (_PLAIN, _plain, "")):
        if signs and not any(sign in text for sign in signs):
            continue
        for match in pattern.finditer(text):
            marker = make(match)
            if marker is not None and match.start() not in seen and not blocks.hold(match.start("number")):
                seen.add(match.start())
                yield marker


def _hashed(match: re.Match[str]) -> _Marker | None:
    if not match["word"] and not match["stop"]:
        return None
    level = len(match["hashes"])
    kind = _Kind(_STEP) if match["word"] else _Kind(_HASHES, level)
    return _Marker(int(match["number"]), match.start(), match.end(), match.span("title"), level, kind)


def _bold(match: re.Match[str]) -> _Marker | None:
    stop = match["stop"] or match["after"]
    if not match["word"] and not stop:
        return None
    kind = _Kind(_STEP) if match["word"] else _Kind(_LIST, _depth(match), stop)
    alone = match.string[match.end() : match.end() + 1] in ("", "\n") and match["title"].strip(" .:-–—")
    title = match.span("title") if alone else None
    return _Marker(int(match["number"]), match.start(), match.end(), title, 0, kind)


def _plain(match: re.Match[str]) -> _Marker | None:
    if not match["word"] and not match["stop"]:
        return None
    kind = _Kind(_STEP) if match["word"] else _Kind(_LIST, _depth(match), match["stop"])
    return _Marker(int(match["number"]), match.start(), match.end(), None, 0, kind)


def _depth(match: re.Match[str]) -> int:
    return len(match["indent"].expandtabs(4))


def _counted(markers: list[_Marker]) -> list[_Marker]:
    """One marker for each number; none when they do not count 1, 2, 3, …"""
    chosen: list[_Marker] = []
    for marker in markers:
        if marker.number == len(chosen) + 1:
            chosen.append(marker)
        elif marker.number != len(chosen):
            return []
    return chosen if len(chosen) > 1 else []


def _end(text: str, chosen: list[_Marker], blocks: Blocks) -> int:
    """How far the steps reach. Named and headed ones go on to the end, a list to the end of its last paragraph."""
    last = chosen[-1]
    return _item_end(text, last, len(text), blocks) if last.kind.family == _LIST else len(text)


def _item_end(text: str, marker: _Marker, end: int, blocks: Blocks) -> int:
    """The first blank line before text that is not indented."""
    for blank in BLANK.finditer(text, marker.body, end):
        if not blocks.hold(blank.start()) and blank.end() < end and text[blank.end() - 1] == "\n":
            return blank.start()
    return end


def _steps(text: str, chosen: list[_Marker], blocks: Blocks, paragraphs: Split) -> list[Span]:
    first, last = chosen[0], chosen[-1]
    spans = [(one.body, following.start) for one, following in pairwise(chosen)]
    before: list[Span] = []
    preamble = text[: first.start].rstrip()
    if preamble and first.title is None and BLANK.match(text, len(preamble)) is None:
        # A line right before the first step belongs to it.
        spans[0] = (0, spans[0][1])
    elif preamble:
        before = paragraphs(0, first.start)
    if any(marker.title for marker in chosen):
        end, after = _sections(text, last, blocks)
    else:
        end = len(text) if any(_parted(text, *pair, blocks) for pair in zip(chosen, spans, strict=False)) else None
        end = _item_end(text, last, len(text), blocks) if end is None else end
        after = paragraphs(end, len(text)) if end < len(text) else []
    spans.append((last.body, end))
    return [*before, *(_or_title(text, *pair) for pair in zip(spans, chosen, strict=True)), *after]


def _parted(text: str, marker: _Marker, span: Span, blocks: Blocks) -> bool:
    """Whether the step goes on after a blank line: then nobody can tell where the last one ends."""
    return bool(text[_item_end(text, marker, span[1], blocks) : span[1]].strip())


def _sections(text: str, last: _Marker, blocks: Blocks) -> tuple[int, list[Span]]:
    """Where the last numbered section ends, and the sections after it: those of other headings of its level."""
    found: list[tuple[int, int, Span]] = []
    for match in _HEADING.finditer(text, last.body):
        level = len(match["hashes"] or "")
        closed = level or re.search(r"\*\*:?[ \t]*+$", match["title"]) is not None
        if closed and (0 < level <= last.level or (not level and not last.level)) and not blocks.hold(match.start()):
            found.append((match.start(), match.end(), match.span("title")))
    starts = [*(start for start, _, _ in found), len(text)]
    after = [_under(text, (found[i][1], end), found[i][2]) for i, end in enumerate(starts[1:])]
    return starts[0], after


def _or_title(text: str, span: Span, marker: _Marker) -> Span:
    return span if marker.title is None else _under(text, span, marker.title)


def _under(text: str, span: Span, title: Span) -> Span:
    """What stands under a title; the title's words where nothing does."""
    if text[slice(*span)].strip():
        return span
    words = text[slice(*title)]
    start = title[0] + len(words) - len(words.lstrip(_AROUND_TITLE))
    return start, max(start, title[1] - (len(words) - len(words.rstrip(" \t*_"))))
