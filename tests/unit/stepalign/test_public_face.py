"""The names that other projects import: listed here, importable, documented."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from inspect import ismodule
from pathlib import Path

import pytest

import stepalign
import stepalign.errors
from stepalign.errors import StepalignError

SDK = Path(stepalign.__file__).parent
PUBLIC = [
    "AlignmentReport",
    "AnswerRule",
    "AttemptReading",
    "ConfigError",
    "ContentError",
    "CriticClient",
    "CriticError",
    "CriticIdentity",
    "CriticRequestError",
    "CriticUnavailableError",
    "Critique",
    "CritiqueBatchItem",
    "CritiqueBatchResponse",
    "CritiqueFailure",
    "CritiqueMode",
    "CritiqueRequest",
    "CritiqueResponse",
    "CritiqueStep",
    "ErrorBody",
    "ErrorDetail",
    "FailureReason",
    "FinishReason",
    "Forced",
    "GradedSample",
    "GraderError",
    "ModelInfo",
    "ModelList",
    "Problem",
    "ProblemFileError",
    "Prompt",
    "PromptError",
    "SplitAttempt",
    "SplitRule",
    "StepStatus",
    "StepalignError",
    "SyncCriticClient",
    "TaggedAnswer",
    "TaggedStep",
    "Trace",
    "TraceIssue",
    "Usage",
    "Verdict",
    "answers_equal",
    "grade",
    "join_steps",
    "load_grader",
    "load_problems",
    "load_prompt",
    "parse_trace",
    "prompt_sets",
    "render_token_ids",
    "render_trace",
    "split_attempt",
    "validate_critique",
]


def test_the_public_face_is_this_list() -> None:
    assert stepalign.__all__ == PUBLIC


def test_the_package_has_no_other_public_name() -> None:
    found = {name for name, value in vars(stepalign).items() if not name.startswith("_") and not ismodule(value)}
    assert found == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_a_docstring_of_its_own(name: str) -> None:
    written = getattr(stepalign, name).__doc__
    # A dataclass without a docstring gets its signature.
    assert written and not written.startswith(f"{name}(")


def raised() -> Iterator[str]:
    for path in SDK.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                yield node.exc.func.id


def test_every_typed_error_that_the_sdk_raises_is_public() -> None:
    typed = {name for name in raised() if name in vars(stepalign.errors)}
    assert {"ConfigError", "CriticUnavailableError"} <= typed <= set(PUBLIC)


def tree(kind: type[StepalignError], depth: int = 0) -> Iterator[tuple[int, str]]:
    yield depth, kind.__name__
    for derived in kind.__subclasses__():
        if derived.__module__ == stepalign.errors.__name__:
            yield from tree(derived, depth + 1)


def test_the_tree_of_errors_is_drawn_in_full() -> None:
    drawn = re.findall(r"^    ([│├└─ ]*)(\w+Error)\b", stepalign.errors.__doc__ or "", re.MULTILINE)
    assert [(len(lines) // 4, name) for lines, name in drawn] == list(tree(StepalignError))
