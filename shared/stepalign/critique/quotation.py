"""What a corrected step must not be: the step that it calls wrong, once more.

The paper's critics that quote a wrong step before they correct it draw the self-teacher's probability to the error. So
a corrected step does not open with the wrong one: whitespace, and opening quotes and brackets, aside. Two openings that
look like it are none: a longer word or number (``= 14`` for ``= 1``), and the wrong step with nothing but the number
that it lacked (``3 + 4 = 7`` for ``3 + 4 =``). Of a wrong step of one or two words only its equal is refused.

Aligned decoding says the same in its grammars (:mod:`stepalign_critic.decoding.grammar`). It is no finer than they can
be: a quotation further inside a step is not refused.
"""

from __future__ import annotations

import re
from functools import lru_cache
from string import ascii_letters, digits
from typing import Literal

Gap = Literal["none", "optional", "required"]

OPENING = "\"'“”‘’([{*_"
CLOSING = ".,;:!?\"'“”‘’)]}*_"
BLANKS = " \t\n\r"
"""Whitespace that tells no two steps apart. Other whitespace does: not every grammar knows it."""
WORD_CHARACTERS = "0-9A-Za-z_"
"""The inside of a class: characters that make a word or number longer."""
_BLANK = re.compile(f"[{BLANKS}]+")
_NEEDLESS_BLANK = re.compile(f"(?<![{WORD_CHARACTERS}]) | (?![{WORD_CHARACTERS}])")
_NO_BLANKS = dict.fromkeys(map(ord, BLANKS))
_FEWEST_WORDS = 3
_WORD = frozenset(ascii_letters + digits + "_")
_GOES_ON = re.compile(rf"\.[0-9]|[{BLANKS}]*[0-9]{{1,12}}[{BLANKS}{re.escape(CLOSING)}]*\Z")
"""What follows a longer number, or a step that lacked nothing but one."""


# A wrong step is looked at by its grammar and then by the validator.
@lru_cache(maxsize=256)
def squeezed(step: str) -> str:
    """A step without the whitespace that parts no two words, and without what opens and closes it.

    Nothing is left of one that is punctuation alone: that cannot be quoted.
    """
    words = " ".join(filter(None, _BLANK.split(step)))
    bare = _NEEDLESS_BLANK.sub("", words)
    return bare.lstrip(OPENING).rstrip(CLOSING)


def gaps(text: str) -> list[tuple[Gap, str]]:
    """The visible characters of a squeezed text, each with the whitespace that may or must stand before it."""
    found: list[tuple[Gap, str]] = []
    before = ""
    for character in text:
        if character != " ":
            inside = is_word(before) and is_word(character)
            gap: Gap = "required" if before == " " else "none" if inside or not found else "optional"
            found.append((gap, character))
        before = character
    return found


def is_word(character: str) -> bool:
    """Whether a character makes a word or number longer."""
    return character in _WORD


def counts_as_opening(wrong: str) -> bool:
    """Whether a step that goes on after the words of ``wrong`` quotes it."""
    return len(wrong.split()) >= _FEWEST_WORDS


def is_quotation(step: str, wrong: str) -> bool:
    """Whether ``step`` is the wrong step again, or opens with it."""
    place = _end_of(squeezed(wrong), step)
    if place is None:
        return False
    rest = step[place:]
    if not rest.strip(BLANKS + CLOSING):
        return True
    longer = is_word(rest[0]) and is_word(squeezed(wrong)[-1])
    return counts_as_opening(wrong) and not longer and _GOES_ON.match(rest) is None


def end_of_common(wrong: str, step: str) -> int:
    """How far ``step`` goes with the words of ``wrong``: where the first character of its own stands."""
    return _walk(squeezed(wrong), step)[0]


def _end_of(squeezed_wrong: str, step: str) -> int | None:
    """Where the wrong step ends in ``step``, if that opens with it."""
    # Most corrections differ in a character: that is seen at once.
    opened = step.translate(_NO_BLANKS).lstrip(OPENING)
    if not opened.startswith(squeezed_wrong.replace(" ", "")):
        return None
    place, whole = _walk(squeezed_wrong, step)
    return place if whole else None


def _walk(squeezed_wrong: str, step: str) -> tuple[int, bool]:
    """Where ``step`` leaves the words of the wrong one, and whether it has all of them."""
    if not squeezed_wrong:
        return 0, False
    place = len(step) - len(step.lstrip(BLANKS + OPENING))
    for gap, character in gaps(squeezed_wrong):
        begin = place
        while place < len(step) and step[place] in BLANKS:
            place += 1
        if (gap == "none" and place > begin) or (gap == "required" and place == begin):
            return begin, False
        if step[place : place + 1] != character:
            return begin, False
        place += 1
    return place, True
