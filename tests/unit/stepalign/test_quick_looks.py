"""Looks that pass over most texts find all that the expressions behind them find."""

from __future__ import annotations

import random

from stepalign.critique import blocks, final_answer, quotation, sheet

WORDS = [
    "answer",
    "Answer",
    "ANSWER",
    "an\u017fwer",
    "answers",
    "is",
    "was",
    "the",
    "final",
    "A:",
    "Ans:",
    "to",
    "a",
    "b",
]
SIGNS = [
    ":",
    "=",
    "7",
    "1.5",
    "**",
    "_",
    ">",
    "#",
    "$",
    "$$",
    "```",
    "~~~",
    "\\(",
    "\\)",
    "\\[",
    "\\]",
    "\\begin{a}",
    ".",
]
PIECES = [*WORDS, *SIGNS, " ", " ", "\n", "\n\n", "\\end{a}", ","]


def texts(count: int) -> list[str]:
    rng = random.Random(7)
    return ["".join(rng.choice(PIECES) for _ in range(rng.randrange(24))) for _ in range(count)]


def test_every_odd_character_is_looked_for() -> None:
    characters = map(chr, range(0x110000))
    assert not [c for c in characters if sheet._ODD.search(c) and not sheet._MAY_BE_ODD.search(c)]


def test_announcements_are_found_where_the_expression_finds_them() -> None:
    for text in texts(4000):
        expected = [lead.span() for lead in final_answer._LEAD.finditer(text)]
        assert [lead.span() for lead in final_answer._leads(text)] == expected, text


def test_a_text_without_marks_of_blocks_has_no_edge() -> None:
    for text in texts(4000):
        assert any(mark in text for mark in blocks._IN_EDGES) or not blocks._EDGE.search(text), text


def test_a_quotation_is_found_whatever_its_blanks() -> None:
    rng = random.Random(8)
    wrong = "So 3 + 4 = 8, and (a b) c"
    for _ in range(500):
        blank = rng.choice([" ", "  ", "\n", " \t"])
        quoted = f"{rng.choice(['', '( ', '**'])}{wrong.replace(' ', blank)}{rng.choice(['', ' .', ' so'])}"
        assert quotation.is_quotation(quoted, wrong), quoted
        place = rng.randrange(len(wrong))
        if wrong[place] not in " (),":
            assert not quotation.is_quotation(wrong[:place] + "~" + wrong[place + 1 :], wrong)
