"""Problem files: rows with these columns.

====================== ======== ======================================================================
``question``           required text
``answer``             required text or number; the tagged answer is compared with it
``id``                 optional unique in all files; default: ``p-`` and 12 hex digits of the question's SHA-256
``reference_solution`` optional a worked solution; the critic sees it where there is one
``source``             optional where the problem comes from
``metadata``           optional an object, kept as it is
====================== ======== ======================================================================

A file is JSON Lines, a JSON array or Parquet (extra ``data``), the first two also packed by gzip; its content says
which. A folder stands for the files in it that are named like one, in the order of their names: :mod:`.files`.
:mod:`.rows` says how a row becomes a problem, GSM8K's form too.

Rows that break this are named by file and line, and everything is refused: nothing runs on half a file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import cast

from stepalign.errors import ProblemFileError, RefusedRow
from stepalign.problems.files import ProblemFile, digest, problem_files
from stepalign.problems.readers import rows_of
from stepalign.problems.rows import problem_of, why_unusable
from stepalign.types import Problem

MOST_REFUSED = 100
"""Rows are named up to this number; then reading ends."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Located:
    """A problem, and the file and row it comes from."""

    problem: Problem
    place: str


def load_problems(path: Path) -> list[Problem]:
    """Read a problem file, or the files of a folder. Raises ProblemFileError naming the bad rows.

    Logs a warning for a file of which no answer looks like one that a grader could match.
    """
    found: list[Problem] = []
    refused: list[RefusedRow] = []
    places: dict[str, str] = {}
    for file in _files(path):
        of_file: list[_Located] = []
        for outcome in _problems(file, places):
            if isinstance(outcome, RefusedRow):
                refused.append(outcome)
            else:
                of_file.append(outcome)
            if len(refused) == MOST_REFUSED:
                raise ProblemFileError(str(path), refused, stopped=True)
        if not refused:
            _warn_if_unusable(file, of_file)
        found += [each.problem for each in of_file]
    if refused:
        raise ProblemFileError(str(path), refused)
    return found


def problems_sha256(path: Path) -> str:
    """SHA-256 of what :func:`load_problems` would read, in hexadecimal.

    Of a file it is that of its content, unpacked; of a folder that of the lines ``<sha256>  <name>`` of its files, as
    ``sha256sum`` prints them. Raises ProblemFileError for files that cannot be read.
    """
    return digest(_files(path), is_folder=path.is_dir())


def _files(path: Path) -> list[ProblemFile]:
    try:
        return problem_files(path)
    except ValueError as error:
        raise ProblemFileError(str(path), [RefusedRow(0, str(error))]) from None


def _problems(file: ProblemFile, places: dict[str, str]) -> Iterator[_Located | RefusedRow]:
    """The file's problems and its refused rows. ``places`` knows the ids of all files so far, and is added to."""
    try:
        unit, rows = rows_of(file)
        first = next(rows, None)
        if first is None:
            raise ValueError("the file holds no problem")
        for row in chain([first], rows):
            try:
                if row.fault is not None:
                    raise ValueError(row.fault)
                problem = problem_of(row.value)
                _check_id(problem, row.value, places)
            except ValueError as error:
                yield RefusedRow(row.number, str(error), unit, file.shown)
                continue
            place = f"{file.shown}, {unit} {row.number}" if file.shown else f"{unit} {row.number}"
            places[problem.id] = place
            yield _Located(problem, place)
    except ValueError as error:
        yield RefusedRow(0, str(error), file=file.shown)


def _check_id(problem: Problem, row: object, places: dict[str, str]) -> None:
    """Raises ValueError for an id that another row has."""
    known = places.get(problem.id)
    if known is None:
        return
    if cast(dict[str, object], row).get("id") is not None:
        raise ValueError(f"id {problem.id!r} is that of {known}; ids must be unique")
    raise ValueError(f"the question is that of {known}; remove one of the two, or give both an id")


def _warn_if_unusable(file: ProblemFile, located: list[_Located]) -> None:
    reasons = [(each, why_unusable(each.problem.answer)) for each in located]
    if reasons and all(reason is not None for _, reason in reasons):
        first, reason = reasons[0]
        _log.warning(
            f"{file.path}: no answer of its {len(reasons)} problems looks like one that a tagged answer can equal. The "
            f"first ({first.place}: {first.problem.answer[:60]!r}) {reason}. Put the final answer alone into `answer`, "
            "and a worked solution into `reference_solution`"
        )
