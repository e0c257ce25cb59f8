"""Texts that a corrected step may and may not be, whatever the dialect of its grammar."""

from __future__ import annotations

from stepalign_critic.decoding.grammar import Free, Grammar

WRONG = "With the map that is 18 + 2 = 22 dollars."
FREE: list[tuple[str, bool]] = [
    ("With the map that is 18 + 2 = 20 dollars.", True),
    (" With the map that is 20.", True),
    ("x < 5, 3 <4, 2 <= 1", True),
    ("zwölf Äpfel ≤ 𝟛", True),
    (WRONG, False),
    ("  \n With the map that is\n18 + 2 = 22 dollars", False),
    ("With the map that is 18+2=22 dollars!", False),
    (f'"{WRONG}" is not so', False),
    (f"{WRONG} No: 20", False),
    ("", False),
    (" ", False),
    ("a </step_2> b", False),
    ("a <answer> b", False),
    ("With the map that is 18 + 2 = 22 dollars and 3 cents", False),
    ("With the map that is 1 8 + 2 = 22 dollars", True),
    ("With the map that is 18 + 2 = 22 dollarsandmore", True),
]
"""Texts in place of ``WRONG``, and whether they are allowed."""
OPENINGS: list[tuple[str, str, bool]] = [
    ("3 + 4 =", "3 + 4 = 7", True),
    ("3 + 4 =", "3 + 4 = 7 or so", False),
    ("7 * 2 = 1", "7 * 2 = 14", True),
    ("7 * 2 = 1", "7 * 2 = 1.4", True),
    ("7 * 2 = 1", "7 * 2 = 1. No.", False),
    ("Hi", "Hi there", True),
    ("Hi", "Hi", False),
    ("7 + 8 = 1 5", "7 + 8 = 15", True),
    ("x < 5 and y", "x < 5 and y", False),
    ("x < 5 and y", "x < 5 and y is so", False),
    ("x < 5 and y", "x < 6 and y", True),
    ("if x <= 3 then 4", "if x <= 3 then 4", False),
]
"""Wrong steps, texts in their place, and whether they are allowed."""


ODD = "".join(map(chr, [*range(1, 0x20), *range(0x7F, 0x100), 0x2028, 0x2029, 0xFEFF, 0xFFFF, 0x1F44D, 0x10FFFF]))
"""Characters beyond printable ASCII that are easily read otherwise than written. NUL is a case of its own."""


def corrected(wrong: str) -> Grammar:
    """What may stand in the place of a wrong second step."""
    return Free(80, "</step_2>", unlike=wrong)
