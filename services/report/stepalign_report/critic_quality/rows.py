"""The answers of a critic, kept row by row as they come, so that an interrupted measurement goes on.

The first line says whose answers they are, to which data, and what the critic was told. Rows of another critic, of
other data, or with something else told are never mixed with them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stepalign.errors import ConfigError
from stepalign.types import CriticIdentity, CritiqueResponse
from stepalign.validation import explain
from stepalign_run.folder.files import make_folder
from stepalign_run.folder.jsonl import end_at_a_whole_row
from stepalign_run.folder.ownership import NotOursError

ROWS_FILES = ("rows.jsonl", "rows-b.jsonl")
"""In an output folder: the answers of the first critic, and of the second."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Told(_Part):
    """Whether the critic was told the reference solution and the known answer, where a row has them."""

    reference_solution: bool
    answer: bool

    def __str__(self) -> str:
        return ", ".join(f"{'with' if given else 'without'} {name.replace('_', ' ')}" for name, given in self)


class Header(_Part):
    """The first line of a file of answers."""

    critic_quality: Literal[1] = 1
    critic: CriticIdentity
    data: str
    """The name of the data set, for messages."""
    data_sha256: str
    told: Told


class Refusal(_Part):
    """A request that the critic will never answer, such as one over its prompt budget."""

    status: int
    code: str | None
    message: str


class Row(_Part):
    """The answer to one solution: a response, or else the refusal. ``seconds`` is the time of the call."""

    id: str
    seconds: float = Field(ge=0)
    response: CritiqueResponse | None = None
    refusal: Refusal | None = None


class RowsFile:
    """A file of answers that is added to. ``rows`` holds them by the solution's id."""

    def __init__(self, path: Path, header: Header) -> None:
        """Open a file that goes on, or begin one.

        Raises ConfigError when it holds the answers of another critic, to other data or with something else told, and
        NotOursError when it is no file of answers.
        """
        self.path = path
        self.rows: dict[str, Row] = {}
        if os.path.lexists(path) and path.stat().st_size:
            found, self.rows = read_rows_file(path)
            _require_same(path, found, header)
            end_at_a_whole_row(path)
            self._file: IO[str] = path.open("a", encoding="utf-8")
        else:
            make_folder(path.parent)
            self._file = path.open("a", encoding="utf-8")
            self._write(header)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def append(self, row: Row) -> None:
        """Keep a row at once: a kill after this call does not lose it."""
        self._write(row)
        self.rows[row.id] = row

    def _write(self, line: Header | Row) -> None:
        self._file.write(line.model_dump_json() + "\n")
        self._file.flush()


def read_rows_file(path: Path) -> tuple[Header, dict[str, Row]]:
    """Header and whole rows, by id; a last row that a kill has cut short is left out.

    Raises NotOursError when it is no file of answers, and ConfigError when it cannot be read or a row is damaged.
    """
    try:
        first, *lines = path.read_text(encoding="utf-8").split("\n")[:-1] or [""]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    try:
        header = Header.model_validate_json(first)
    except ValidationError:
        said = "it holds no answers that critic-quality has kept, and is left as it is: give another place"
        raise NotOursError(f"{path}: {said}") from None
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, start=2):
        try:
            row = Row.model_validate_json(line)
        except ValidationError as error:
            raise ConfigError(
                f"{path}, line {number}: {explain(error)}; remove the line, and it is asked again"
            ) from None
        rows[row.id] = row
    return header, rows


def header_of(path: Path) -> Header | None:
    """The header of a file of answers; None where there is none yet. Raises NotOursError as above."""
    if not (os.path.lexists(path) and path.stat().st_size):
        return None
    return read_rows_file(path)[0]


def _require_same(path: Path, found: Header, wanted: Header) -> None:
    other = [
        f"{name} ({_shown(mine)}, now {_shown(theirs)})"
        for name, mine, theirs in (
            ("critic", found.critic, wanted.critic),
            ("data", (found.data, found.data_sha256), (wanted.data, wanted.data_sha256)),
            ("what the critic is told", found.told, wanted.told),
        )
        if (mine[1:] != theirs[1:] if isinstance(mine, tuple) and isinstance(theirs, tuple) else mine != theirs)
    ]
    if other:
        raise ConfigError(
            f"{path} holds answers of another kind and is not mixed with them. It differs in: {'; '.join(other)}. Give "
            "another --out"
        )


def _shown(value: Any) -> str:
    match value:
        case CriticIdentity():
            return json.dumps(value.model_dump(), ensure_ascii=False)
        case (name, digest):
            return f"{name} {digest[:12]}"
        case _:
            return str(value)
