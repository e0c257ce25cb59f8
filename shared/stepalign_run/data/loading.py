"""Labelled solutions from a file, a folder of files, or the Hugging Face hub.

Files are opened and taken apart as problem files are (:mod:`stepalign.problems`). The first row of a file says of which
form it is. Bad rows are refused together, by file and line, and nothing is asked on half a file.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, cast

from stepalign.errors import ConfigError, ProblemFileError, RefusedRow
from stepalign.problems import MOST_REFUSED
from stepalign.problems.files import SUFFIXES, ProblemFile, problem_files
from stepalign.problems.readers import RepeatedKey, Row, rows_of
from stepalign_run.data.formats import Format, format_of
from stepalign_run.data.grouped import grouped_rows, is_grouped
from stepalign_run.data.hub import hub_rows
from stepalign_run.data.labelled import LabelledSolution, LeftOutError


@dataclass(frozen=True)
class LabelledData:
    """The solutions of a data set. ``left_out`` counts rows that it gives no usable label, by reason."""

    name: str
    formats: tuple[str, ...]
    solutions: tuple[LabelledSolution, ...]
    left_out: dict[str, int]

    @property
    def sha256(self) -> str:
        """Of what is asked and of the labels, whatever file they come from, in hexadecimal."""
        content = hashlib.sha256()
        for solution in self.solutions:
            content.update(solution.model_dump_json().encode() + b"\n")
        return content.hexdigest()


@dataclass
class _Reading:
    """What the rows so far have given."""

    place_of: dict[str, str] = field(default_factory=dict[str, str])
    repeats: Counter[str] = field(default_factory=Counter[str])
    formats: list[str] = field(default_factory=list[str])
    solutions: list[LabelledSolution] = field(default_factory=list[LabelledSolution])
    left_out: Counter[str] = field(default_factory=Counter[str])

    def add(self, file: str, unit: str, rows: Iterable[Row]) -> Iterator[RefusedRow]:
        """Read a file's rows. Yields those that are refused."""
        form: Format | None = None
        for row in rows:
            try:
                fields = _fields(row)
                form = form or format_of(fields)
                self._keep(
                    form.read(fields), fields, f"{file}, {unit} {row.number}" if file else f"{unit} {row.number}"
                )
            except LeftOutError as reason:
                self.left_out[str(reason)] += 1
            except ValueError as error:
                yield RefusedRow(row.number, str(error), unit, file)
        if form is not None and form.name not in self.formats:
            self.formats.append(form.name)

    def _keep(self, solution: LabelledSolution, fields: dict[str, Any], place: str) -> None:
        known = self.place_of.get(solution.id)
        if known is not None and (fields.get("id") is not None or fields.get("uuid") is not None):
            raise ValueError(f"id {solution.id!r} is that of {known}; ids must be unique")
        if known is not None:
            # One solution that several people have labelled.
            self.repeats[solution.id] += 1
            solution = solution.model_copy(update={"id": f"{solution.id}.{self.repeats[solution.id] + 1}"})
        self.place_of[solution.id] = place
        self.solutions.append(solution)


def load_labelled(data: str, split: str | None = None) -> LabelledData:
    """The labelled solutions of a file or folder, or else of the data set of that name in the hub.

    Raises ProblemFileError naming the bad rows, and ConfigError where there is no such data set. ``split`` is the
    hub's.
    """
    path, reading = Path(data), _Reading()
    if not path.exists() and (data.startswith(("/", ".", "~")) or data.endswith(SUFFIXES)):
        raise ConfigError(f"{data}: there is no such file")
    refused: list[RefusedRow] = []
    for file, unit, rows in _files(path) if path.exists() else [("", "row", hub_rows(data, split))]:
        try:
            for row in reading.add(file, unit, rows):
                refused.append(row)
                if len(refused) == MOST_REFUSED:
                    raise ProblemFileError(data, refused, stopped=True)
        except ValueError as error:
            refused.append(RefusedRow(0, str(error), file=file))
    if not refused and not reading.solutions:
        left = "; ".join(f"{count} {reason}" for reason, count in reading.left_out.items())
        refused.append(RefusedRow(0, f"there is no labelled solution in it ({left or 'no row'})"))
    if refused:
        raise ProblemFileError(data, refused)
    name = path.name if path.exists() else data if split is None else f"{data}:{split}"
    return LabelledData(name, tuple(reading.formats), tuple(reading.solutions), dict(sorted(reading.left_out.items())))


def _files(path: Path) -> Iterator[tuple[str, str, Iterable[Row]]]:
    """Of each file its name in messages, what its rows are counted as, and the rows."""
    try:
        files = problem_files(path)
    except ValueError as error:
        raise ProblemFileError(str(path), [RefusedRow(0, str(error))]) from None
    for file in files:
        yield file.shown, *_opened(file)


def _opened(file: ProblemFile) -> tuple[str, Iterable[Row]]:
    try:
        if is_grouped(file):
            return "row", grouped_rows(file)
        unit, rows = rows_of(file)
    except ValueError as error:
        return "line", chain([Row(0, fault=str(error))])
    return unit, rows


def _fields(row: Row) -> dict[str, Any]:
    """Raises ValueError for a row that is no object."""
    if row.fault is not None:
        raise ValueError(row.fault)
    value: object = row.value
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    if isinstance(value, RepeatedKey):
        raise ValueError("a key stands twice in the object; keep one of the two")
    return cast("dict[str, Any]", value)
