"""Equality of final answers: exact rational numbers where both are numbers, normalised text otherwise."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:/[1-9]\d*)?")
THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d*)?")
MAX_DIGITS = 400


# A known answer is compared with the attempt's and with the critique's, and with those of many other attempts.
@lru_cache(maxsize=1024)
def _number(text: str) -> Fraction | None:
    plain = text.strip("$ ").removesuffix(".").strip()
    if THOUSANDS.fullmatch(plain):
        plain = plain.replace(",", "")
    if len(plain) > MAX_DIGITS or not _NUMBER.fullmatch(plain):
        return None
    numerator, _, denominator = plain.partition("/")
    return Fraction(numerator) / Fraction(denominator or 1)


def answers_equal(left: str, right: str) -> bool:
    """Whether two answers are the same number (``0.50`` = ``1/2``, ``$1,200`` = ``1200``) or, caseless, text."""
    a, b = _number(left), _number(right)
    if a is not None and b is not None:
        return a == b
    return " ".join(left.split()).casefold() == " ".join(right.split()).casefold()


def answer_key(answer: str) -> str:
    """A key that is the same for equal answers. Votes are counted by it."""
    number = _number(answer)
    return str(number) if number is not None else " ".join(answer.split()).casefold()
