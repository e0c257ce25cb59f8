"""A part of a text as it is read, and where each of its characters stands in the text as it was sent.

Reading an attempt drops and replaces characters before it looks for steps: line ends become ``\\n``; characters that
show nothing (byte-order mark, zero-width spaces, soft hyphens, controls of direction, NUL, …) are dropped. A joiner
between two characters beyond ASCII stays: emoji and several scripts are made of them.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from stepalign.critique.trace import Span

_LINE_END = "\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]"
_JOINER = "(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])"
_INVISIBLE = (
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u17b4\u17b5\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\ufeff\ufff9-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f]++"
)
_ODD = re.compile(f"({_LINE_END})|{_INVISIBLE}|{_JOINER}")
# One class of characters is looked for ten times as fast.
_MAY_BE_ODD = re.compile(f"[\r\u200c\u200d{_LINE_END[_LINE_END.index('[') + 1 : -1]}{_INVISIBLE[1:-3]}]")


class Sheet(NamedTuple):
    """``text`` with its origins.

    ``starts`` are places in ``text``, the first of them 0, and ``origins`` their places in the sent text. From one
    start to the next both count on together.
    """

    text: str
    starts: tuple[int, ...] = (0,)
    origins: tuple[int, ...] = (0,)

    def origin(self, place: int) -> int:
        """Where the character at ``place`` was sent. The place after the last character counts on from it."""
        run = bisect_right(self.starts, place) - 1
        return self.origins[run] + place - self.starts[run]

    @property
    def sent(self) -> Span:
        """From the first character to the last in the text as it was sent."""
        first = self.origin(0)
        return (first, self.origin(len(self.text) - 1) + 1) if self.text else (first, first)

    def part(self, start: int, end: int) -> Sheet:
        """The characters from ``start`` to ``end``."""
        if len(self.starts) == 1:
            return Sheet(self.text[start:end], (0,), (self.origins[0] + start,))
        first, last = bisect_right(self.starts, start), bisect_right(self.starts, end - 1)
        starts = (0, *(place - start for place in self.starts[first:last]))
        return Sheet(self.text[start:end], starts, (self.origin(start), *self.origins[first:last]))

    def moved(self, by: int) -> Sheet:
        """The same, where the sent text stands ``by`` characters later in a longer one."""
        return Sheet(self.text, self.starts, tuple(origin + by for origin in self.origins))

    def trimmed(self) -> Sheet:
        """Without whitespace around it."""
        text = self.text
        start = len(text) - len(text.lstrip())
        end = max(start, len(text.rstrip()))
        return self if end - start == len(text) else self.part(start, end)

    def replaced(self, changes: Iterable[tuple[Span, str]]) -> Sheet:
        """Each span, in order and disjoint, replaced by a text, whose characters all stand where the span began."""
        texts: list[str] = []
        starts: list[int] = []
        origins: list[int] = []
        length = done = 0

        def keep(until: int) -> None:
            nonlocal length
            if done < until:
                first, last = bisect_right(self.starts, done), bisect_right(self.starts, until - 1)
                starts.extend((length, *(length + place - done for place in self.starts[first:last])))
                origins.extend((self.origin(done), *self.origins[first:last]))
                texts.append(self.text[done:until])
                length += until - done

        for (start, end), by in changes:
            keep(start)
            starts.extend(range(length, length + len(by)))
            origins.extend([self.origin(start)] * len(by))
            texts.append(by)
            length, done = length + len(by), end
        keep(len(self.text))
        return Sheet("".join(texts), tuple(starts) or (0,), tuple(origins) or (self.origin(0),))


def normalised(text: str) -> Sheet:
    """A sent text with line ends that are line feeds, and without characters that show nothing."""
    if _MAY_BE_ODD.search(text) is None:
        return Sheet(text)
    return Sheet(text).replaced((match.span(), "\n" if match[1] else "") for match in _ODD.finditer(text))
