from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stepalign.critique.alignment import validate_critique
from stepalign.errors import ConfigError
from stepalign.plugins import load_checker
from stepalign.problems import load_problems
from stepalign.types import Critique
from stepalign_lab.commands import lab
from stepalign_lab.sums import parse_addends, sample_sums, sum_critique

QUESTION = "7 + 8 + 5"
ONE, TWO, ANSWER = "<step_1>7 + 8 = 15</step_1>", "<step_2>15 + 5 = 20</step_2>", "<answer>20</answer>"

CASES = {
    "A": (f"{ONE}\n{TWO}\n{ANSWER}", f"{ONE}<copied/>\n{TWO}<copied/>\n{ANSWER}\n<verdict>correct</verdict>"),
    "A, other spacing and order": (
        f"<step_1>8+7  = 15</step_1> {TWO} {ANSWER}",
        f"<step_1>8+7  = 15</step_1><copied/>\n{TWO}<copied/>\n{ANSWER}\n<verdict>correct</verdict>",
    ),
    "B": (f"{ONE}\n{ANSWER}", f"{ONE}<copied/>\n{TWO}<inserted/>\n{ANSWER}\n<verdict>unjustified</verdict>"),
    "C": (f"{ONE}\n", f"{ONE}<copied/>\n{TWO}<continued/>\n{ANSWER}\n<verdict>incomplete</verdict>"),
    "C, inside a number": (
        f"{ONE}\n<step_2>15 +5 = 2",
        f"{ONE}<copied/>\n<step_2>15 +5 = 20</step_2><continued/>\n{ANSWER}\n<verdict>incomplete</verdict>",
    ),
    "C, before a number": (
        f"{ONE}\n<step_2>15 + ",
        f"{ONE}<copied/>\n{TWO}<continued/>\n{ANSWER}\n<verdict>incomplete</verdict>",
    ),
    "C, the other order": (
        "<step_1>8 +",
        "<step_1>8 + 7 = 15</step_1><continued/>\n<step_2>5 + 15 = 20</step_2><continued/>\n"
        f"{ANSWER}\n<verdict>incomplete</verdict>",
    ),
    "D": (
        f"{ONE}\n<step_2>15 + 5 = 21</step_2>\n<answer>21</answer>",
        f"{ONE}<copied/>\n{TWO}<corrected/>\n{ANSWER}\n<verdict>incorrect</verdict>",
    ),
    "D, a number broken by a space": (
        f"<step_1>7 + 8 = 1 5</step_1>\n{TWO}\n{ANSWER}",
        f"{ONE}<corrected/>\n{TWO}<continued/>\n{ANSWER}\n<verdict>incorrect</verdict>",
    ),
    "D, an early answer": (
        f"{ONE}\n<answer>15</answer>",
        f"{ONE}<copied/>\n{TWO}<inserted/>\n{ANSWER}\n<verdict>incorrect</verdict>",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_critique_of_each_case_and_that_it_validates(case: str) -> None:
    attempt, expected = CASES[case]
    assert load_checker("sums")(QUESTION, attempt) == expected
    assert isinstance(validate_critique(expected, attempt, known_answer="20"), Critique)


def test_critiques_of_attempts_cut_and_spoiled_anywhere_validate() -> None:
    rng = random.Random(3)
    verdicts: set[str] = set()
    for row in sample_sums(60, 4, seed=1):
        first, *addends = parse_addends(row["question"])
        total, parts = first, []
        for number, addend in enumerate(addends, start=1):
            parts.append(f"<step_{number}>{total} + {addend} = {total + addend}</step_{number}>")
            total += addend
        text = "\n".join([*parts, f"<answer>{total}</answer>"])
        for _ in range(8):
            place = rng.randrange(len(text))
            spoiled = text[:place] + rng.choice(["3", " ", ""]) + text[place + 1 :]
            for attempt in (text[:place], spoiled):
                critique = validate_critique(
                    sum_critique(row["question"], attempt), attempt, known_answer=row["answer"]
                )
                assert isinstance(critique, Critique), (attempt, critique)
                verdicts.add(critique.verdict.value)
    assert verdicts == {"correct", "unjustified", "incomplete", "incorrect"}


@pytest.mark.parametrize("question", ["", "7", "7 + x", "7+8", "7 + 8 = 15", "7 - 8"])
def test_a_question_that_is_no_sum_is_refused(question: str) -> None:
    with pytest.raises(ValueError, match="no sum"):
        sum_critique(question, "")


def test_the_command_writes_problems_with_right_answers_and_none_twice(tmp_path: Path) -> None:
    target = tmp_path / "new" / "sums.jsonl"
    result = CliRunner().invoke(lab, ["sums", str(target), "--count", "50", "--addends", "3", "--seed", "4"])
    assert result.exit_code == 0, result.output
    problems = load_problems(target)
    assert len({problem.question for problem in problems}) == 50
    for problem in problems:
        total = sum(parse_addends(problem.question))
        assert int(problem.answer) == total
        assert problem.reference_solution is not None and problem.reference_solution.endswith(f"The sum is {total}.")
    assert [json.loads(line)["question"] for line in target.read_text().splitlines()] == [
        row["question"] for row in sample_sums(50, 3, seed=4)
    ]


def test_more_sums_than_there_are_and_sums_of_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="too few sums"):
        sample_sums(41, 2, seed=0)
    with pytest.raises(ConfigError, match="2 to 12"):
        sample_sums(1, 1, seed=0)
