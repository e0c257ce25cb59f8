"""Rows of problem files: the documented columns, what people write into them, and bad rows named by line."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from stepalign.critique.answers import answers_equal
from stepalign.errors import ProblemFileError
from stepalign.problems import MOST_REFUSED, load_problems
from stepalign.types import Problem

REPO = Path(__file__).parents[3]


def write(tmp_path: Path, *rows: str) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


def load_row(tmp_path: Path, **row: Any) -> Problem:
    (problem,) = load_problems(write(tmp_path, json.dumps({"question": "q", "answer": "1"} | row)))
    return problem


def refusal_of(tmp_path: Path, row: str) -> str:
    """The reason for which a file of this row is refused."""
    with pytest.raises(ProblemFileError) as refused:
        load_problems(write(tmp_path, row))
    (found,) = refused.value.rows
    assert (found.number, found.unit, found.file) == (1, "line", "")
    return found.reason


def test_optional_fields_and_numeric_answers(tmp_path: Path) -> None:
    path = write(tmp_path, '{"question": "1 + 1?", "answer": 2}', "", '{"id": "b", "question": "q", "answer": "x"}')
    first, second = load_problems(path)
    assert first.answer == "2" and first.id.startswith("p-") and first.reference_solution is None
    assert second.id == "b"
    assert load_problems(path)[0].id == first.id


def test_bad_rows_are_all_named_by_line_and_nothing_is_returned(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '{"id": "a", "question": "q", "answer": "1"}',
        "not json",
        '{"question": "q"}',
        '{"id": "a", "question": "other", "answer": "1"}',
        '{"question": "q", "answer": "1", "anwser": "2"}',
        "[1]",
        '{"question": "", "answer": true}',
    )
    with pytest.raises(ProblemFileError) as error:
        load_problems(path)
    assert [row.number for row in error.value.rows] == [2, 3, 4, 5, 6, 7]
    assert "line 4: id 'a' is that of line 1" in str(error.value)


def test_line_separators_inside_a_string_do_not_end_a_row(tmp_path: Path) -> None:
    path = write(tmp_path, '{"question": "a\u2028b", "answer": "1"}', "broken")
    with pytest.raises(ProblemFileError) as error:
        load_problems(path)
    assert [row.number for row in error.value.rows] == [2]


def test_a_row_without_a_question_is_asked_for_that_alone(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"answer": "1"}\n')
    with pytest.raises(ProblemFileError) as refused:
        load_problems(path)
    assert [row.reason for row in refused.value.rows] == ["question: missing; columns found: 'answer'"]


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProblemFileError, match="holds no problem"):
        load_problems(write(tmp_path, ""))
    with pytest.raises(ProblemFileError, match="cannot be read"):
        load_problems(tmp_path / "none.jsonl")


def test_the_shipped_examples_load() -> None:
    problems = load_problems(REPO / "examples" / "word_problems.jsonl")
    assert len(problems) == 20
    assert all(problem.reference_solution for problem in problems)


GSM8K = {
    "question": "How many clips did Natalia sell?",
    "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = <<48+24=72>>72 clips.\n#### 72",
}


def test_gsm8k_gives_its_answer_and_its_solution_without_the_calculators_notes(tmp_path: Path) -> None:
    problem = load_row(tmp_path, **GSM8K)
    assert problem.answer == "72"
    assert problem.reference_solution == "Natalia sold 48/2 = 24 clips in May.\nAltogether 48+24 = 72 clips."


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("#### 65,960", "65960"),
        ("x\n #### -1,234.5. \n\n", "-1234.5"),
        ("x\n#### $1,800.00", "$1800.00"),
        ("x\n#### -€1,234,567.", "-€1234567"),
        ("x\n####1,800 %", "1800 %"),
        ("#### 18.", "18"),
        ("#### 1,2", "1,2"),
        ("x\n#### 18 dollars.", "18 dollars."),
    ],
)
def test_numbers_of_gsm8k_lose_the_commas_between_thousands_and_a_full_stop(
    tmp_path: Path, written: str, answer: str
) -> None:
    problem = load_row(tmp_path, answer=written)
    assert problem.answer == answer
    assert problem.reference_solution == ("x" if written.startswith("x") else None)


@pytest.mark.parametrize("answer", ["The grid is #### in text", "x#### no", "a #### 1 #### 2", "##### 3"])
def test_a_mark_inside_a_line_is_the_answers_own(tmp_path: Path, answer: str) -> None:
    problem = load_row(tmp_path, answer=answer)
    assert problem.answer == answer and problem.reference_solution is None


def test_a_reference_of_its_own_is_kept_beside_gsm8ks(tmp_path: Path) -> None:
    assert load_row(tmp_path, **GSM8K, reference_solution="mine").reference_solution == "mine"
    assert load_row(tmp_path, **GSM8K, reference_solution=" ").reference_solution.startswith("Natalia")


@pytest.mark.parametrize("answer", ["24 clips\n####", "#### 1\n#### 2", "#### Step 1\n24 clips"])
def test_half_of_gsm8ks_form_is_refused(tmp_path: Path, answer: str) -> None:
    reason = refusal_of(tmp_path, json.dumps({"question": "q", "answer": answer}))
    assert reason.startswith("answer: #### stands before the final answer, as in GSM8K")


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("1e-05", "0.00001"),
        ("1e+22", "1" + "0" * 22),
        ("-2.50", "-2.50"),
        ("0.1", "0.1"),
        ("3.14159265358979323846264338327950288", "3.14159265358979323846264338327950288"),
        ("9" * 30, "9" * 30),
        ("[7]", "7"),
        ('["x = 7"]', "x = 7"),
    ],
)
def test_a_number_becomes_the_digits_that_the_grader_compares(tmp_path: Path, written: str, answer: str) -> None:
    (problem,) = load_problems(write(tmp_path, f'{{"question": "q", "answer": {written}}}'))
    assert problem.answer == answer
    assert answers_equal(problem.answer, f" {answer} ")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ('"answer": NaN', "answer: NaN is no answer"),
        ('"answer": Infinity', "answer: a number of more than 400 digits, or an infinite one"),
        ('"answer": 1e401', "answer: a number of more than 400 digits"),
        ('"answer": -1e-999999999', "answer: a number of more than 400 digits"),
        ('"answer": 1e99999999999999999999999', "answer: a number of more than 400 digits"),
        (f'"answer": {"7" * 5000}', "answer: a number of more than 400 digits"),
        ('"answer": true', "answer: true is no text"),
        ('"answer": ["1", "2"]', "answer: a list of 2 answers; the grader compares with one"),
        ('"answer": [["1"]]', "answer: a list of 1 answers"),
        ('"answer": []', "answer: a list of 0 answers"),
        ('"answer": {"value": 1}', "answer: dict is neither text nor number"),
        ('"answer": "  "', "answer: it is blank"),
        ('"answer": "\u200b\\u2060 \\u3164\\ufe0f\\u0000"', "answer: it is blank"),
        ('"answer": null', "answer: missing; columns found: 'question'"),
        ('"answer": "1", "answer": "2"', "a key stands twice"),
        ('"answer": "\\ud800"', "answer: there is half of a surrogate pair"),
        ('"answer": "1", "source": "\\ud800"', "source: there is half of a surrogate pair"),
        ('"answer": "1", "reference_solution": "\\udfff"', "reference_solution: there is half of a surrogate pair"),
        ('"answer": "1", "id": "a b"', "id: 'a b' may hold only ASCII letters"),
        ('"answer": "1", "id": "' + "a" * 151 + '"', "id: it has 151 characters; 150 are the most"),
        ('"answer": "1", "metadata": {"a": [0, {"b": "\\ud800"}]}', "metadata: a[1].b: there is half of a surrogate"),
        ('"answer": "1", "metadata": {"\\ud800": 1}', "metadata: a key of it: there is half of a surrogate pair"),
        ('"answer": "1", "metadata": {"a": NaN}', "metadata: a: no finite number (nan)"),
        ('"answer": "1", "metadata": {"a": 1e999}', "metadata: a: no finite number (inf)"),
        ('"answer": "1", "metadata": {"a": -' + "9" * 5000 + "}", "metadata: a: a whole number of more than 64 bits"),
        ('"answer": "1", "metadata": {"a": 9223372036854775808}', "metadata: a: a whole number of more than 64 bits"),
        ('"answer": "1", "metadata": {"a": ' + "[" * 300 + "]" * 300 + "}", "metadata: nested deeper than 32 levels"),
        ('"answer": "1", "metadata": {"a": ' + "[" * 9999 + "]" * 9999 + "}", "nested too deeply; 32 levels"),
        ('"answer": "1", "metadata": "text"', "metadata: Input should be a valid dictionary"),
        ('"answer": "1", "level": 5', "unknown: 'level'; put it into metadata or remove it (known are id, question"),
    ],
)
def test_what_nobody_could_grade_or_carry_is_refused_by_line(tmp_path: Path, fields: str, reason: str) -> None:
    found = refusal_of(tmp_path, f'{{"question": "q", {fields}}}')
    # Python 3.12 and later read deeper before they give up.
    assert found.startswith((reason, "metadata: nested deeper") if "too deeply" in reason else reason)


def test_an_object_around_rows_is_named(tmp_path: Path) -> None:
    found = refusal_of(tmp_path, '{"version": 1, "data": [{"question": "q", "answer": "1"}]}')
    assert found.startswith("no problem, but an object that holds rows in 'data'; write one row a line, or the array")


def test_null_is_absent_and_a_number_may_be_an_id(tmp_path: Path) -> None:
    problem = load_row(tmp_path, id=17, reference_solution=None, source=None, metadata=None)
    assert problem == Problem(id="17", question="q", answer="1")
    assert load_row(tmp_path, id=None).id.startswith("p-")
    assert load_row(tmp_path, reference_solution=" \n").reference_solution is None


def test_metadata_is_kept_as_it_is(tmp_path: Path) -> None:
    metadata = {"level": 5, "share": 0.1, "big": 2**63 - 1, "tags": ["a", None, True, {"\u00fc\x00": "\U0001f600"}]}
    assert load_row(tmp_path, metadata=metadata).metadata == metadata


def test_equal_questions_without_an_id_are_named_with_both_lines(tmp_path: Path) -> None:
    with pytest.raises(ProblemFileError, match="line 2: the question is that of line 1; remove one of the two"):
        load_problems(write(tmp_path, *['{"question": "q", "answer": "1"}'] * 2))


def test_a_fault_of_many_rows_is_told_once_and_reading_ends(tmp_path: Path) -> None:
    rows = [f'{{"question": "q{i}", "answer": "1", "level": 1}}' for i in range(3 * MOST_REFUSED)]
    with pytest.raises(ProblemFileError) as refused:
        load_problems(write(tmp_path, "{", *rows))
    assert len(refused.value.rows) == 1  # an object over several lines
    with pytest.raises(ProblemFileError) as refused:
        load_problems(write(tmp_path, "broken", *rows))
    assert len(refused.value.rows) == MOST_REFUSED and refused.value.stopped
    _, first, second, last = str(refused.value).splitlines()
    assert first == "  line 1: not JSON: Expecting value at column 1"
    assert second.startswith("  lines 2, 3, 4, 5, 6 and 94 more: unknown: 'level'; ")
    assert last == "  the rest was not read after 100 refused rows"


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (["First 2.\nThen 3.", "One.\nTwo."], "has several lines, as a worked solution has"),
        (["long " * 60], "has more than 200 characters"),
        (["$\\boxed{3}$", "\\boxed{4}"], "stands in \\boxed{}"),
        (["x #### 18", "y #### 19"], "holds ####, which GSM8K writes at the start of the last line"),
        (["nan", "None"], "says that there is none"),
        (["<answer> 3 </answer>"], "holds the tag that an answer stands in"),
    ],
)
def test_a_file_without_a_usable_answer_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, answers: list[str], reason: str
) -> None:
    rows = [json.dumps({"question": f"q{i}", "answer": answer}) for i, answer in enumerate(answers)]
    with caplog.at_level(logging.WARNING):
        path = write(tmp_path, *rows)
        load_problems(path)
        (warning,) = caplog.messages
        assert (
            warning.startswith(f"{path}: no answer of its {len(rows)} problems")
            and f"(line 1: {answers[0][:60]!r}) {reason}" in warning
        )
        caplog.clear()
        load_problems(write(tmp_path, *rows, '{"question": "good", "answer": "3"}'))
        assert caplog.messages == []
