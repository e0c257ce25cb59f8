"""The rows that a run writes, one for each update: its metrics, and the outcomes of its rollouts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stepalign.errors import CheckpointError
from stepalign_run.folder.files import replace_text
from stepalign_run.folder.jsonl import read_rows


class StepJournal:
    """Appends rows with a ``step``. On resume, those after the checkpoint's are cut off: their updates come again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def resume_at(self, step: int) -> None:
        """Cut off. Raises CheckpointError when there is no room for it."""
        kept = [row for row in self.rows() if row["step"] <= step]
        if self.path.exists():
            with self._room():
                replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def rows(self) -> list[dict[str, Any]]:
        """The whole rows that are there."""
        return read_rows(self.path)

    def append(self, row: dict[str, Any]) -> None:
        """Write a row to the disk. Raises CheckpointError when there is no room."""
        with self._room(), self.path.open("a", encoding="utf-8") as rows:
            rows.write(json.dumps(row) + "\n")
            rows.flush()
            os.fsync(rows.fileno())

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be written ({error.strerror}); make room, then --resume: nothing is lost"
            ) from error
