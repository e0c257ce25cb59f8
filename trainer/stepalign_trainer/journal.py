"""The run's metrics: one JSON object per update in ``metrics.jsonl``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from stepalign.files import replace_text

FILE = "metrics.jsonl"


class MetricsJournal:
    """Appends rows. On resume, rows after the checkpoint's step are cut off: their updates will be made again."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE
        run_dir.mkdir(parents=True, exist_ok=True)

    def resume_at(self, step: int) -> None:
        kept = [row for row in self.rows() if row["step"] <= step]
        if self.path.exists():
            replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def rows(self) -> list[dict[str, Any]]:
        """The whole rows that are there."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as rows:
            rows.write(json.dumps(row) + "\n")
            rows.flush()
            os.fsync(rows.fileno())
