"""The parts of a text that are never split: fenced code, displayed mathematics, LaTeX environments and tables."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict

from stepalign.critique.trace import Span

# Texts are hostile: possessive quantifiers keep every pattern linear.
_EDGE = re.compile(
    r"^[ \t]*+(?P<fence>`{3,}+|~{3,}+)(?P<info>[^\n]*+)$"
    r"|(?<!\\)\\(?P<bracket>[\[\]()])"
    r"|(?P<dollars>\$\$)"
    r"|\\(?P<edge>begin|end)\{(?P<name>[A-Za-z]{1,40}+\*?)\}",
    re.M,
)
_IN_EDGES = ("\\", "$$", "```", "~~~")
"""One of these is in every edge."""
_PIPES = re.compile(r"^[ \t]*+\|[^\n]*+(?:\n[ \t]*+\|[^\n]*+)++", re.M)
_RULED = re.compile(
    r"^[^\n|]++\|[^\n]*+\n[ \t]*+:?-++:?[ \t]*+(?:\|[ \t]*+:?-*+:?[ \t]*+)++$(?:\n[^\n|]*+\|[^\n]*+)*+", re.M
)
_SORT = {"[": "square", "]": "square", "(": "round", ")": "round"}


class Blocks:
    """The blocks of one text, in order and disjoint."""

    def __init__(self, text: str) -> None:
        tables = (*_PIPES.finditer(text), *_RULED.finditer(text)) if "|" in text else ()
        found = [*_delimited(text), *(match.span() for match in tables)]
        self._spans: list[Span] = []
        for span in sorted(found, key=lambda span: (span[0], -span[1])):
            if not self._spans or span[0] >= self._spans[-1][1]:
                self._spans.append(span)
        self._starts = [start for start, _ in self._spans]

    def hold(self, place: int) -> bool:
        """Whether the character at ``place`` is inside of a block."""
        before = bisect_right(self._starts, place) - 1
        return before >= 0 and place < self._spans[before][1]


def _delimited(text: str) -> list[Span]:
    if not any(mark in text for mark in _IN_EDGES):
        return []
    edges = list(_EDGE.finditer(text))
    partners = _partners(edges)
    spans: list[Span] = []
    for i, edge in enumerate(edges):
        if spans and edge.start() < spans[-1][1]:
            continue
        if i in partners:
            spans.append((edge.start(), edges[partners[i]].end()))
        elif edge["fence"]:
            # As in Markdown, a fence that is never closed goes on to the end.
            spans.append((edge.start(), len(text)))
    return spans


def _partners(edges: list[re.Match[str]]) -> dict[int, int]:
    """The closing edge of each opening one that has one, by their places in the list.

    Brackets do not nest: one that opens before the last one was closed shows that the last one never is.
    """
    partners: dict[int, int] = {}
    nearest: dict[str, int] = {}
    ends: defaultdict[str, list[int]] = defaultdict(list)
    for i in range(len(edges) - 1, -1, -1):
        edge = edges[i]
        bracket = edge["bracket"]
        if bracket:
            closer = nearest.get(_SORT[bracket])
            if bracket in "[(" and closer is not None and edges[closer]["bracket"] in "])":
                partners[i] = closer
            nearest[_SORT[bracket]] = i
        elif edge["edge"] == "begin" and ends[edge["name"]]:
            partners[i] = ends[edge["name"]].pop()
        elif edge["edge"] == "end":
            ends[edge["name"]].append(i)
    partners.update(_pairs([i for i, edge in enumerate(edges) if edge["dollars"]]))
    partners.update(_fences(edges))
    return partners


def _pairs(places: list[int]) -> dict[int, int]:
    return dict(zip(places[::2], places[1::2], strict=False))


def _fences(edges: list[re.Match[str]]) -> dict[int, int]:
    pairs: dict[int, int] = {}
    opened: int | None = None
    for i, edge in enumerate(edges):
        fence = edge["fence"]
        if not fence:
            continue
        if opened is None:
            opened = i
        elif fence.startswith(edges[opened]["fence"]) and not edge["info"].strip():
            pairs[opened], opened = i, None
    return pairs
