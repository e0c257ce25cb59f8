"""Equality of final answers: exact rational numbers where both are numbers, normalised text otherwise.

A grader decides whether two answers are the same: True, False, or None where it cannot tell. :func:`answers_equal` is
the grader ``exact``; others are found by name (:mod:`stepalign.plugins`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import lru_cache
from typing import Protocol, runtime_checkable

Judgement = bool | None
"""Whether two answers are the same; None is unknown: neither equal nor different."""

Grader = Callable[[str, str], Judgement]
"""``(answer, known_answer)`` to a judgement."""


@runtime_checkable
class Foretelling(Protocol):
    """A grader that may take its time over some answers and can tell beforehand over which."""

    def __call__(self, answer: str, known_answer: str, /) -> Judgement: ...

    def at_once(self, answer: str, known_answer: str, /) -> bool:
        """Whether the judgement takes microseconds. So does this question."""
        ...


_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:/[1-9]\d*)?")
THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d*)?")
MAX_DIGITS = 400


def number_of(text: str) -> Fraction | None:
    """The number that ``text`` writes, exactly; None where it is none, or of more than ``MAX_DIGITS`` characters."""
    plain = text.strip("$ ").removesuffix(".").strip()
    # The commas of so many digits are a third more; what is longer must not fill the cache.
    return _number(plain) if len(plain) <= 2 * MAX_DIGITS else None


# A known answer is compared with the attempt's and with the critique's, and with those of many other attempts.
@lru_cache(maxsize=1024)
def _number(plain: str) -> Fraction | None:
    if THOUSANDS.fullmatch(plain):
        plain = plain.replace(",", "")
    if len(plain) > MAX_DIGITS or not _NUMBER.fullmatch(plain):
        return None
    numerator, _, denominator = plain.partition("/")
    return Fraction(numerator) / Fraction(denominator or 1)


def answers_equal(left: str, right: str) -> bool:
    """Whether two answers are the same number (``0.50`` = ``1/2``, ``$1,200`` = ``1200``) or, caseless, text."""
    if left == right:
        return True
    a, b = number_of(left), number_of(right)
    if a is not None and b is not None:
        return a == b
    return same_text(left, right)


def same_text(left: str, right: str) -> bool:
    """Whether two answers are the same words, caseless."""
    return " ".join(left.split()).casefold() == " ".join(right.split()).casefold()


def judged(grader: Grader, answer: str, known_answer: str) -> Judgement:
    """What ``grader`` says. Where it cannot tell or fails, the same words are equal and others unknown."""
    try:
        said = grader(answer, known_answer)
    except Exception:
        said = None
    return True if said is None and same_text(answer, known_answer) else said


def equal_classes(answers: Iterable[str], grader: Grader) -> list[set[str]]:
    """Distinct answers in classes of equal ones, in the order of their first members.

    An answer joins the first class whose first member it equals, by ``grader``; unknown is not equal. So every answer
    is in one class, also where a grader is not transitive. Distinct answers alone are compared.
    """
    first: list[str] = []
    classes: list[set[str]] = []
    for answer in dict.fromkeys(answers):
        found = next((i for i, member in enumerate(first) if judged(grader, answer, member)), None)
        if found is None:
            first.append(answer)
            classes.append({answer})
        else:
            classes[found].add(answer)
    return classes
