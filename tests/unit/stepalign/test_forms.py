"""The two ways of writing a critique that fail in the paper, to the letter, in both spacings."""

from __future__ import annotations

import pytest

from stepalign.critique.alignment import validate_critique
from stepalign.critique.forms import first_uncopied, omit_copied_steps, quote_wrong_step
from stepalign.types import Critique, Verdict
from stepalign_lab.checker import exact_critique

QUESTION = "3 + 4 * 7 - 2"
ONE, TWO, THREE = "<step_1> 3 + 4 = 7 </step_1>", "<step_2> 7 * 7 = 9 </step_2>", "<step_3> 9 - 2 = 7 </step_3>"
WRONG_ONE, WRONG_TWO = "<step_1> 3 + 4 = 1 </step_1>", "<step_2> 7 * 7 = 8 </step_2>"
ANSWER, WRONG_ANSWER = "<answer> 7 </answer>", "<answer> 5 </answer>"


def critique_of(*segments: str) -> tuple[Critique, str]:
    """The lab's exact critique of an attempt, written on one line."""
    attempt = " ".join(segments)
    critique = validate_critique(exact_critique(QUESTION, attempt), attempt, known_answer="7")
    assert isinstance(critique, Critique), critique
    return critique, attempt


# Attempt, verdict, and the critique's segments: those that it copies, and the rest.
CASES: dict[str, tuple[list[str], Verdict, list[str], list[str]]] = {
    "correct": ([ONE, TWO, THREE, ANSWER], Verdict.CORRECT, [ONE, TWO, THREE], [ANSWER]),
    "missing step": (
        [ONE, "<step_2> 9 - 2 = 7 </step_2>", ANSWER],
        Verdict.UNJUSTIFIED,
        [ONE],
        [TWO, THREE, ANSWER],
    ),
    "missing first step": (
        ["<step_1> 7 * 7 = 9 </step_1>", "<step_2> 9 - 2 = 7 </step_2>", ANSWER],
        Verdict.UNJUSTIFIED,
        [],
        [ONE, TWO, THREE, ANSWER],
    ),
    "unfinished": ([ONE, "<step_2> 7 *"], Verdict.INCOMPLETE, [ONE], [TWO, THREE, ANSWER]),
    "no answer": ([ONE, TWO, THREE], Verdict.INCOMPLETE, [ONE, TWO, THREE], [ANSWER]),
    "wrong step": (
        [ONE, WRONG_TWO, "<step_3> 8 - 2 = 6 </step_3>", WRONG_ANSWER],
        Verdict.INCORRECT,
        [ONE],
        [TWO, THREE, ANSWER],
    ),
    "wrong first step": ([WRONG_ONE, WRONG_ANSWER], Verdict.INCORRECT, [], [ONE, TWO, THREE, ANSWER]),
    "wrong answer": ([ONE, TWO, THREE, WRONG_ANSWER], Verdict.INCORRECT, [ONE, TWO, THREE], [ANSWER]),
    "answer too early": ([ONE, TWO, WRONG_ANSWER], Verdict.INCORRECT, [ONE, TWO], [THREE, ANSWER]),
    "unfinished and wrong": ([ONE, "<step_2> 7 +"], Verdict.INCORRECT, [ONE], [TWO, THREE, ANSWER]),
}
QUOTED = {
    "wrong step": WRONG_TWO,
    "wrong first step": WRONG_ONE,
    "wrong answer": WRONG_ANSWER,
    "answer too early": WRONG_ANSWER,
    "unfinished and wrong": "<step_2> 7 +",
}


@pytest.mark.parametrize("case", CASES)
def test_omission_keeps_what_is_not_copied_and_no_more(case: str) -> None:
    attempt, verdict, copied, rest = CASES[case]
    critique, _ = critique_of(*attempt)
    assert critique.verdict is verdict
    assert critique.text == " ".join([*copied, *rest])
    assert omit_copied_steps(critique) == " ".join(rest)
    assert critique.text[: first_uncopied(critique)].split() == " ".join(copied).split()


@pytest.mark.parametrize("case", CASES)
def test_full_repetition_quotes_the_refused_part_before_its_correction(case: str) -> None:
    attempt, _, copied, rest = CASES[case]
    critique, text = critique_of(*attempt)
    quoted = [QUOTED[case]] if case in QUOTED else []
    assert quote_wrong_step(critique, text) == " ".join([*copied, *quoted, *rest])


def chat_critique(attempt: str, critic_text: str) -> Critique:
    critique = validate_critique(critic_text, attempt, known_answer="20")
    assert isinstance(critique, Critique), critique
    return critique


CHAT_ATTEMPT = (
    "<step_1>The tickets cost 3 * 6 = 18 dollars.</step_1>\n"
    "<step_2>With the map that is 18 - 2 = 16 dollars.</step_2>\n"
    "<answer>16</answer>"
)


def test_both_keep_the_lines_of_a_critique_with_a_step_a_line() -> None:
    critique = chat_critique(
        CHAT_ATTEMPT,
        "<step_1>The tickets cost 3 * 6 = 18 dollars.</step_1><copied/>\n"
        "<step_2>With the map that is 18 + 2 = 20 dollars.</step_2><corrected/>\n"
        "<answer>20</answer>\n<verdict>incorrect</verdict>",
    )
    assert omit_copied_steps(critique) == (
        "<step_2>With the map that is 18 + 2 = 20 dollars.</step_2>\n<answer>20</answer>"
    )
    assert quote_wrong_step(critique, CHAT_ATTEMPT) == (
        "<step_1>The tickets cost 3 * 6 = 18 dollars.</step_1>\n"
        "<step_2>With the map that is 18 - 2 = 16 dollars.</step_2>\n"
        "<step_2>With the map that is 18 + 2 = 20 dollars.</step_2>\n"
        "<answer>20</answer>"
    )


def test_a_first_step_is_quoted_on_a_line_of_its_own_too() -> None:
    attempt = CHAT_ATTEMPT.replace("3 * 6 = 18", "3 + 6 = 9")
    critique = chat_critique(
        attempt,
        "<step_1>The tickets cost 3 * 6 = 18 dollars.</step_1><corrected/>\n"
        "<step_2>With the map that is 18 + 2 = 20 dollars.</step_2><continued/>\n"
        "<answer>20</answer>\n<verdict>incorrect</verdict>",
    )
    assert omit_copied_steps(critique) == critique.text
    assert quote_wrong_step(critique, attempt) == (
        "<step_1>The tickets cost 3 + 6 = 9 dollars.</step_1>\n"
        "<step_1>The tickets cost 3 * 6 = 18 dollars.</step_1>\n"
        "<step_2>With the map that is 18 + 2 = 20 dollars.</step_2>\n"
        "<answer>20</answer>"
    )


def test_a_step_too_many_is_quoted_before_the_answer() -> None:
    attempt = CHAT_ATTEMPT.replace("18 - 2 = 16", "18 + 2 = 20").replace(
        "<answer>16", "<step_3>Without the map it is 18.</step_3>\n<answer>18"
    )
    critique = chat_critique(
        attempt,
        "<step_1>The tickets cost 3 * 6 = 18 dollars.</step_1><copied/>\n"
        "<step_2>With the map that is 18 + 2 = 20 dollars.</step_2><copied/>\n"
        "<answer>20</answer>\n<verdict>incorrect</verdict>",
    )
    assert critique.first_error_step == 3
    assert omit_copied_steps(critique) == "<answer>20</answer>"
    assert quote_wrong_step(critique, attempt).endswith(
        "<step_3>Without the map it is 18.</step_3>\n<answer>20</answer>"
    )
