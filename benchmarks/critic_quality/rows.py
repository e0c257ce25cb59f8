"""Rows of a benchmark, kept one by one as they are finished: a kill loses none, and a rerun passes them over.

The first line of a file says what its rows were made of. Rows of something else are never added to it.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.errors import BenchError
from stepalign_run.folder.jsonl import end_at_a_whole_row


class BenchRows:
    """A file of rows that is added to. ``rows`` holds them by their ``id``."""

    def __init__(self, path: Path, made_of: dict[str, Any]) -> None:
        """Open a file that goes on, or begin one. Raises BenchError when it holds rows of something else."""
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        there = path.exists() and b"\n" in path.read_bytes()
        if there:
            self.rows = read_rows(path, made_of)
            end_at_a_whole_row(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a" if there else "w", encoding="utf-8")
        if not there:
            self._write(made_of)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def append(self, row: dict[str, Any]) -> None:
        """Keep a row, which has an ``id``, at once."""
        self._write(row)
        self.rows[row["id"]] = row

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()


def read_rows(path: Path, made_of: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The whole rows of a file by id; a last one that a kill has cut short is left out, and none without a file.

    Raises BenchError when they were made of something else.
    """
    first, *lines = path.read_text(encoding="utf-8").split("\n")[:-1] or [""] if path.exists() else [""]
    if not first:
        return {}
    found = json.loads(first)
    if found != made_of:
        parts = sorted(name for name in found | made_of if found.get(name) != made_of.get(name))
        raise BenchError(f"{path} holds rows of another {' and '.join(parts)}: move it away to measure anew")
    rows = [json.loads(line) for line in lines]
    return {row["id"]: row for row in rows}
