"""Problem files: the documented schema, and bad rows named by line."""

from pathlib import Path

import pytest

from stepalign.errors import ProblemFileError
from stepalign.problems import load_problems

REPO = Path(__file__).parents[3]


def write(tmp_path: Path, *rows: str) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


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
    assert [line for line, _ in error.value.rows] == [2, 3, 4, 5, 6, 7]
    assert "line 4: id 'a' is that of line 1" in str(error.value)


def test_line_separators_inside_a_string_do_not_end_a_row(tmp_path: Path) -> None:
    path = write(tmp_path, '{"question": "a\u2028b", "answer": "1"}', "broken")
    with pytest.raises(ProblemFileError) as error:
        load_problems(path)
    assert [line for line, _ in error.value.rows] == [2]


def test_a_row_without_a_question_is_asked_for_that_alone(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"answer": "1"}\n')
    with pytest.raises(ProblemFileError) as refused:
        load_problems(path)
    assert refused.value.rows == [(1, "question: Field required")]


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProblemFileError, match="holds no problem"):
        load_problems(write(tmp_path, ""))
    with pytest.raises(ProblemFileError, match="cannot be read"):
        load_problems(tmp_path / "none.jsonl")


def test_the_shipped_examples_load() -> None:
    problems = load_problems(REPO / "examples" / "word_problems.jsonl")
    assert len(problems) == 20
    assert all(problem.reference_solution for problem in problems)
