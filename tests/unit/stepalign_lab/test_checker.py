"""The exact critic by hand: 3 + 4 = 7, 7 * 7 = 9, 9 - 2 = 7."""

from __future__ import annotations

import random

import pytest

from stepalign.critique.alignment import validate_critique
from stepalign.types import Critique
from stepalign_lab.checker import exact_critique
from stepalign_lab.documents import synthetic_attempt
from stepalign_lab.domain import sample_chain

QUESTION = "3 + 4 * 7 - 2"
COPIED_1 = "<step_1> 3 + 4 = 7 </step_1> <copied/>"
COPIED_2 = "<step_2> 7 * 7 = 9 </step_2> <copied/>"
COPIED_3 = "<step_3> 9 - 2 = 7 </step_3> <copied/>"
S1, S2, S3 = (copy.removesuffix(" <copied/>") for copy in (COPIED_1, COPIED_2, COPIED_3))
END = "<answer> 7 </answer>"

CASES = {
    "A": (f"{S1} {S2} {S3} {END}", f"{COPIED_1} {COPIED_2} {COPIED_3} {END} <verdict> correct </verdict>"),
    "A in the reference's wording": (
        f"<step_1> 7 is 4 + of 3 </step_1> {S2} {S3} {END}",
        f"<step_1> 7 is 4 + of 3 </step_1> <copied/> {COPIED_2} {COPIED_3} {END} <verdict> correct </verdict>",
    ),
    "B in the middle": (
        f"{S1} <step_2> 9 - 2 = 7 </step_2> {END}",
        f"{COPIED_1} <step_2> 7 * 7 = 9 </step_2> <inserted/> {COPIED_3} {END} <verdict> unjustified </verdict>",
    ),
    "B at the end": (
        f"{S1} {S2} {END}",
        f"{COPIED_1} {COPIED_2} <step_3> 9 - 2 = 7 </step_3> <inserted/> {END} <verdict> unjustified </verdict>",
    ),
    "B takes the wording of the step before": (
        f"<step_1> 7 is 4 + of 3 </step_1> {S2} {END}",
        "<step_1> 7 is 4 + of 3 </step_1> <copied/> <step_2> 7 * 7 = 9 </step_2> <copied/> "
        f"<step_3> 9 - 2 = 7 </step_3> <inserted/> {END} <verdict> unjustified </verdict>",
    ),
    "B, only the answer": (
        END,
        "<step_1> 3 + 4 = 7 </step_1> <inserted/> <step_2> 7 * 7 = 9 </step_2> <inserted/> "
        f"<step_3> 9 - 2 = 7 </step_3> <inserted/> {END} <verdict> unjustified </verdict>",
    ),
    "C between steps": (
        f"{S1}",
        f"{COPIED_1} <step_2> 7 * 7 = 9 </step_2> <continued/> <step_3> 9 - 2 = 7 </step_3> <continued/> {END} "
        "<verdict> incomplete </verdict>",
    ),
    "C inside a step": (
        f"{S1} <step_2> 7 *",
        f"{COPIED_1} <step_2> 7 * 7 = 9 </step_2> <continued/> <step_3> 9 - 2 = 7 </step_3> <continued/> {END} "
        "<verdict> incomplete </verdict>",
    ),
    "C inside a step of the other wording, which the rest then keeps": (
        f"{S1} <step_2> 9 is",
        f"{COPIED_1} <step_2> 9 is 7 * of 7 </step_2> <continued/> <step_3> 7 is 2 - of 9 </step_3> <continued/> {END} "
        "<verdict> incomplete </verdict>",
    ),
    "C before the answer": (
        f"{S1} {S2} {S3} <answer> 7",
        f"{COPIED_1} {COPIED_2} {COPIED_3} {END} <verdict> incomplete </verdict>",
    ),
    "C, nothing at all": (
        "",
        "<step_1> 3 + 4 = 7 </step_1> <continued/> <step_2> 7 * 7 = 9 </step_2> <continued/> "
        f"<step_3> 9 - 2 = 7 </step_3> <continued/> {END} <verdict> incomplete </verdict>",
    ),
    "D": (
        f"{S1} <step_2> 7 * 7 = 8 </step_2> <step_3> 8 - 2 = 6 </step_3> <answer> 6 </answer>",
        f"{COPIED_1} <step_2> 7 * 7 = 9 </step_2> <corrected/> <step_3> 9 - 2 = 7 </step_3> <continued/> {END} "
        "<verdict> incorrect </verdict>",
    ),
    "D although the answer is right": (
        f"{S1} <step_2> 7 * 7 = 8 </step_2> <step_3> 8 - 2 = 7 </step_3> {END}",
        f"{COPIED_1} <step_2> 7 * 7 = 9 </step_2> <corrected/> <step_3> 9 - 2 = 7 </step_3> <continued/> {END} "
        "<verdict> incorrect </verdict>",
    ),
    "D takes the wording of the last right step": (
        "<step_1> 7 is 4 + of 3 </step_1> <step_2> 7 * 7 = 8 </step_2> <answer> 8 </answer>",
        "<step_1> 7 is 4 + of 3 </step_1> <copied/> <step_2> 9 is 7 * of 7 </step_2> <corrected/> "
        f"<step_3> 7 is 2 - of 9 </step_3> <continued/> {END} <verdict> incorrect </verdict>",
    ),
    "D in the first step takes the solver's own wording": (
        "<step_1> 8 is 4 + of 3 </step_1> <answer> 8 </answer>",
        "<step_1> 3 + 4 = 7 </step_1> <corrected/> <step_2> 7 * 7 = 9 </step_2> <continued/> "
        f"<step_3> 9 - 2 = 7 </step_3> <continued/> {END} <verdict> incorrect </verdict>",
    ),
    "D, a malformed step gives no wording": (
        f"{S1} <step_2> 9 is 7 of 7 </step_2> <answer> 7 </answer>",
        f"{COPIED_1} <step_2> 7 * 7 = 9 </step_2> <corrected/> <step_3> 9 - 2 = 7 </step_3> <continued/> {END} "
        "<verdict> incorrect </verdict>",
    ),
    "D, the answer": (
        f"{S1} {S2} {S3} <answer> 8 </answer>",
        f"{COPIED_1} {COPIED_2} {COPIED_3} {END} <verdict> incorrect </verdict>",
    ),
    "D, an early answer": (
        f"{S1} <answer> 5 </answer>",
        f"{COPIED_1} <step_2> 7 * 7 = 9 </step_2> <inserted/> <step_3> 9 - 2 = 7 </step_3> <continued/> {END} "
        "<verdict> incorrect </verdict>",
    ),
    "D, a step too many": (
        f"{S1} {S2} {S3} <step_4> 7 + 0 = 7 </step_4> {END}",
        f"{COPIED_1} {COPIED_2} {COPIED_3} {END} <verdict> incorrect </verdict>",
    ),
    "D in an unfinished step": (
        f"{S1} <step_2> 7 +",
        f"{COPIED_1} <step_2> 7 * 7 = 9 </step_2> <corrected/> <step_3> 9 - 2 = 7 </step_3> <continued/> {END} "
        "<verdict> incorrect </verdict>",
    ),
    "D, an unfinished step too many": (
        f"{S1} {S2} {S3} <step_4> 7",
        f"{COPIED_1} {COPIED_2} {COPIED_3} {END} <verdict> incorrect </verdict>",
    ),
    "D, a wrong number": (
        f"{S1} <step_3> 7 * 7 = 9 </step_3> <step_4> 9 - 2 = 7 </step_4> {END}",
        f"{COPIED_1} <step_2> 7 * 7 = 9 </step_2> <corrected/> <step_3> 9 - 2 = 7 </step_3> <continued/> {END} "
        "<verdict> incorrect </verdict>",
    ),
    "D, a step that is not closed": (
        f"<step_1> 3 + 4 = 7 {S2} {S3} {END}",
        "<step_1> 3 + 4 = 7 </step_1> <corrected/> <step_2> 7 * 7 = 9 </step_2> <continued/> "
        f"<step_3> 9 - 2 = 7 </step_3> <continued/> {END} <verdict> incorrect </verdict>",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_critique_of_each_case(case: str) -> None:
    attempt, expected = CASES[case]
    assert exact_critique(QUESTION, attempt) == expected


@pytest.mark.parametrize("case", CASES)
def test_every_exact_critique_passes_validation(case: str) -> None:
    attempt, _ = CASES[case]
    critique = validate_critique(exact_critique(QUESTION, attempt), attempt, known_answer="7")
    assert isinstance(critique, Critique), critique
    assert critique.answer == "7"


def test_exact_critiques_of_synthetic_attempts_pass_validation() -> None:
    rng = random.Random(5)
    verdicts = set()
    for _ in range(500):
        chain = sample_chain(rng)
        attempt = synthetic_attempt(chain, rng)
        answer = str(chain.results()[-1])
        critique = validate_critique(exact_critique(chain.question, attempt), attempt, known_answer=answer)
        assert isinstance(critique, Critique), (chain.question, attempt, critique)
        verdicts.add(critique.verdict.value)
    assert verdicts == {"correct", "unjustified", "incomplete", "incorrect"}


def test_a_question_that_is_no_chain_is_refused() -> None:
    with pytest.raises(ValueError, match="no chain"):
        exact_critique("What is 1 + 1?", "2")
