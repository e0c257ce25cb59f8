"""Numbers of a problem file as texts that a grader can read: digits and a point, without an exponent."""

from __future__ import annotations

from decimal import Decimal
from typing import Self

from stepalign.critique.answers import MAX_DIGITS


class WrittenNumber(float):
    """A number of a JSON text that remembers how it is written: a float has 17 digits, an answer may have more."""

    text: str

    def __new__(cls, text: str) -> Self:
        number = super().__new__(cls, text)
        number.text = text
        return number

    @staticmethod
    def whole(text: str) -> int:
        """A whole number; of one that is too long for any use as many digits as make it be refused for that."""
        return int(text[: MAX_DIGITS + 1])


def plain_digits(number: float | Decimal) -> str:
    """``1e-05`` → ``0.00001``, ``1e+22`` → 23 digits. Raises ValueError for a number that no grader compares."""
    text = number.text if isinstance(number, WrittenNumber) else str(number)
    try:
        exact = Decimal(text)
    except ArithmeticError:
        exact = Decimal("Infinity")
    if exact.is_nan():
        raise ValueError("NaN is no answer; write the answer, or remove the problem")
    # Formatting a number with a large exponent would fill the memory.
    if exact.is_infinite() or abs(exact.adjusted()) > MAX_DIGITS or len(plain := f"{exact:f}") > MAX_DIGITS:
        raise ValueError(f"a number of more than {MAX_DIGITS} digits, or an infinite one; write it as text")
    return plain
