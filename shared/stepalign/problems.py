"""Problem files: JSON Lines, one problem a row.

==================== ======== =========================================================================
``question``         required text
``answer``           required text or number; the tagged answer is compared with it
``id``               optional unique in the file; default: ``p-`` and 12 hex digits of the question's SHA-256
``reference_solution`` optional a worked solution; the critic sees it where there is one
``source``           optional where the problem comes from
``metadata``         optional an object, kept as it is
==================== ======== =========================================================================

A row that breaks this is named by its line and the file is refused: nothing runs on half a file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from stepalign.errors import ProblemFileError
from stepalign.types import Problem


def load_problems(path: Path) -> list[Problem]:
    """Read a problem file. Raises ProblemFileError naming every bad row."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ProblemFileError(str(path), [(0, f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        raise ProblemFileError(str(path), [(0, f"cannot be read: {error}")]) from None
    problems: list[Problem] = []
    refused: list[tuple[int, str]] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            problem = _parse_row(line)
        except ValueError as error:
            refused.append((number, str(error)))
            continue
        if problem.id in line_of:
            refused.append((number, f"id {problem.id!r} is that of line {line_of[problem.id]}; ids must be unique"))
            continue
        line_of[problem.id] = number
        problems.append(problem)
    if not problems and not refused:
        refused.append((0, "the file holds no problem"))
    if refused:
        raise ProblemFileError(str(path), refused)
    return problems


def _parse_row(line: str) -> Problem:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    fields = cast(dict[str, Any], row)
    answer = fields.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        fields["answer"] = str(answer)
    question = fields.get("question")
    # Where the question is missing, the message names the question and not the id.
    if "id" not in fields:
        fields["id"] = "p-" + hashlib.sha256(str(question).encode()).hexdigest()[:12]
    try:
        return Problem.model_validate(fields)
    except ValidationError as error:
        raise ValueError("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())) from None
