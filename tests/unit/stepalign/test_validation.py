"""The words of failed validations, and that no message of the product ends in a link of a library's."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from stepalign.types import CritiqueRequest, CritiqueResponse
from stepalign.validation import explain

REPO = Path(__file__).parents[3]
ROOMS = ("shared", "services", "trainer", "lab")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[", "Invalid JSON: EOF while parsing a list at line 1 column 1"),
        ('{"question": "q"}', "send either attempt or steps"),
        ('{"question": 3, "attempt": "a"}', "question: Input should be a valid string"),
    ],
)
def test_a_problem_is_told_with_its_place(content: str, said: str) -> None:
    with pytest.raises(ValidationError) as error:
        CritiqueRequest.model_validate_json(content)
    assert explain(error.value) == said


def test_of_many_problems_the_first_are_told() -> None:
    with pytest.raises(ValidationError) as error:
        CritiqueResponse.model_validate({})
    assert explain(error.value).count("Field required") == 5
    assert explain(error.value).endswith(f"; and {error.value.error_count() - 5} more")


def handlers(tree: ast.AST) -> Iterator[ast.ExceptHandler]:
    """Those of failed validations, whose errors have names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.name and node.type is not None:
            caught = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)}
            if "ValidationError" in caught:
                yield node


def prints(handler: ast.ExceptHandler) -> bool:
    """Whether the error itself becomes text, which pydantic ends in a link."""
    for node in ast.walk(handler):
        made = node.value if isinstance(node, ast.FormattedValue) else None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("str", "repr"):
            made = node.args[0]
        if isinstance(made, ast.Name) and made.id == handler.name:
            return True
    return False


def test_no_failed_validation_is_printed_as_pydantic_prints_it() -> None:
    found = 0
    for path in (path for room in ROOMS for path in (REPO / room).rglob("*.py")):
        for handler in handlers(ast.parse(path.read_text(encoding="utf-8"))):
            found += 1
            assert not prints(handler), f"{path}:{handler.lineno}: tell it with stepalign.validation.explain"
    assert found > 5


def test_no_status_of_an_answer_becomes_an_error_of_httpx() -> None:
    """Its words hold a link to a page about the status."""
    files = [path for room in ROOMS for path in (REPO / room).rglob("*.py")]
    assert [path for path in files if "raise_for_status" in path.read_text(encoding="utf-8")] == []
