"""The run's metrics: one JSON object per update in ``metrics.jsonl``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


class MetricsJournal:
    """Appends rows. On resume, rows after the checkpoint's step are cut off: their updates will be made again."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE
        run_dir.mkdir(parents=True, exist_ok=True)

    def resume_at(self, step: int) -> None:
        if not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1].splitlines()
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(scratch, self.path)

    def append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as rows:
            rows.write(json.dumps(row) + "\n")
            rows.flush()
            os.fsync(rows.fileno())
