"""One row → one problem.

Columns that are null count as absent, and so does a blank ``reference_solution``. Numbers become text without an
exponent, and a list of one answer is that answer.

**GSM8K** writes its solution into the answer, with the calculator's notes ``<<48/2=24>>`` in it, and ends with a line
``#### 18``. What follows ``####`` is then the answer; a number loses the commas between thousands and a full stop. What
precedes it is the reference solution, without the notes, unless the row has a ``reference_solution`` of its own.
"""

from __future__ import annotations

import hashlib
import re
from decimal import Decimal
from typing import Any, cast

from pydantic import ValidationError

from stepalign.critique.answers import THOUSANDS
from stepalign.problems.numbers import plain_digits
from stepalign.problems.readers import RepeatedKey
from stepalign.types import Problem

LONGEST_ANSWER = 200
"""Characters. Longer ones are legal, and hardly ever answers."""

_COLUMNS = tuple(Problem.model_fields)
_REQUIRED = ("question", "answer")
_MARK = re.compile(r"(?<!#)####(?!#)")
_MARKED_LINE = re.compile(r"^[^\S\n]*####(?!#)", re.MULTILINE)
_AMOUNT = re.compile(rf"([+-]?[$€£¥]? ?)({THOUSANDS.pattern}|\d+(?:\.\d+)?)( ?[$€£¥%]?)\.?")
_NOTE = re.compile(r"<<[^<>\n]*>>")
_NO_ANSWERS = frozenset({"nan", "nat", "none", "null", "n/a", "<na>"})
_LISTED, _LONGEST_SHOWN = 12, 40


def problem_of(row: object) -> Problem:
    """Raises ValueError with everything that is wrong with the row."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if isinstance(row, RepeatedKey):
        raise ValueError("a key stands twice in the object; keep one of the two")
    holder = _holder_of_rows(cast(dict[str, Any], row))
    if holder is not None:
        raise ValueError(
            f"no problem, but an object that holds rows in {holder[:_LONGEST_SHOWN]!r}; write one row a line, or the "
            "array of them alone"
        )
    fields = {name: value for name, value in cast(dict[str, Any], row).items() if value is not None}
    faults = _missing_columns(fields)
    unknown = _unknown_columns(fields)
    for name, read in (("id", _id), ("answer", _answer)):
        if name in fields:
            try:
                fields[name] = read(fields[name])
            except ValueError as error:
                faults[name] = str(error)
    if "answer" in fields and "answer" not in faults:
        try:
            _split_gsm8k(fields)
        except ValueError as error:
            faults["answer"] = str(error)
    reference = fields.get("reference_solution")
    if isinstance(reference, str) and not reference.strip():
        del fields["reference_solution"]
    # Where the question is missing, the message names the question and not the id.
    if "id" not in fields:
        question = str(fields.get("question")).encode("utf-8", "surrogatepass")
        fields["id"] = "p-" + hashlib.sha256(question).hexdigest()[:12]
    try:
        problem = Problem.model_validate(fields)
    except ValidationError as error:
        for item in error.errors():
            name = str(item["loc"][0])
            faults.setdefault(name, item["msg"].removeprefix("Value error, "))
    else:
        if not faults and unknown is None:
            return problem
    told = [f"{name}: {fault}" for name, fault in faults.items()]
    raise ValueError("; ".join(told if unknown is None else [*told, unknown]))


def _holder_of_rows(row: dict[str, Any]) -> str | None:
    """The name of the rows in an object around them, such as ``{"data": [{…}, …]}``."""
    if any(name in row for name in _REQUIRED):
        return None
    lists = ((name, cast("list[object]", value)) for name, value in row.items() if isinstance(value, list) and value)
    return next((name for name, members in lists if all(isinstance(member, dict) for member in members)), None)


def _missing_columns(fields: dict[str, Any]) -> dict[str, str]:
    found = _listed(list(fields)) or "none"
    return {name: f"missing; columns found: {found}" for name in _REQUIRED if name not in fields}


def _unknown_columns(fields: dict[str, Any]) -> str | None:
    """The fault of columns that a problem has not; they are taken out. None where there are none."""
    unknown = [name for name in fields if name not in _COLUMNS]
    for name in unknown:
        del fields[name]
    if not unknown:
        return None
    return f"unknown: {_listed(unknown)}; put it into metadata or remove it (known are {', '.join(_COLUMNS)})"


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name[:_LONGEST_SHOWN]) for name in names[:_LISTED])
    return f"{shown} and {len(names) - _LISTED} more" if len(names) > _LISTED else shown


def _id(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _answer(value: object) -> str:
    match value:
        case str():
            return value
        case bool():
            raise ValueError(f'{str(value).lower()} is no text; write it in quotes, as in "yes"')
        case int() | float() | Decimal():
            return plain_digits(value)
        case list():
            return _only(cast("list[object]", value))
        case _:
            raise ValueError(f"{type(value).__name__} is neither text nor number; write the answer as text")


def _only(answers: list[object]) -> str:
    if len(answers) != 1 or isinstance(answers[0], list):
        raise ValueError(
            f"a list of {len(answers)} answers; the grader compares with one: keep one, or join them as text"
        )
    return _answer(answers[0])


def _split_gsm8k(fields: dict[str, Any]) -> None:
    """Replace the answer of GSM8K's form. Raises ValueError for one that has such a line and is none of that form.

    A mark inside a line is the answer's own, as in a grid of ``#``.
    """
    marks = list(_MARKED_LINE.finditer(fields["answer"]))
    if not marks:
        return
    answer = fields["answer"][marks[0].end() :].strip()
    if not answer or "\n" in answer or _MARK.search(answer):
        raise ValueError("#### stands before the final answer, as in GSM8K: once, with one line after it; mend the row")
    solution = _NOTE.sub("", fields["answer"][: marks[0].start()]).strip()
    fields["answer"] = _plain_amount(answer)
    reference = fields.get("reference_solution")
    if reference is None or (isinstance(reference, str) and not reference.strip()):
        fields["reference_solution"] = solution


def _plain_amount(answer: str) -> str:
    """``$-1,234.5.`` → ``$-1234.5``; what is no number stays as it is."""
    amount = _AMOUNT.fullmatch(answer)
    return answer if amount is None else "".join(amount.groups()).replace(",", "").removesuffix(".")


def why_unusable(answer: str) -> str | None:
    """Why no tagged answer can equal this one, as the end of a sentence about it; None where one may."""
    text = answer.strip()
    if _MARK.search(text):
        return "holds ####, which GSM8K writes at the start of the last line"
    if "\n" in text:
        return "has several lines, as a worked solution has"
    if len(text) > LONGEST_ANSWER:
        return f"has more than {LONGEST_ANSWER} characters, as a worked solution has"
    if "<answer>" in text or "</answer>" in text:
        return "holds the tag that an answer stands in"
    if r"\boxed" in text:
        return r"stands in \boxed{}, which is compared letter by letter"
    if text.casefold() in _NO_ANSWERS:
        return "says that there is none"
    return None
