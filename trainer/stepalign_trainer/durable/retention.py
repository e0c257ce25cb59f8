"""Which checkpoints stay.

The rule: the newest ``trainer.keep_checkpoints``; of those at steps that the evaluation scores, the best by validation,
and those that are not scored yet, since each of them may be the best. Without validation problems the newest alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from stepalign_run.config import Config
from stepalign_run.folder.jsonl import read_rows
from stepalign_run.selection import evaluated_steps, select_step


def prune(config: Config) -> None:
    """Remove the checkpoints that the rule does not keep."""
    found = config.folder.checkpoints_by_step()
    kept = set(sorted(found)[-config.trainer.keep_checkpoints :])
    if config.data.validation is not None:
        key = f"avg_at_{config.evaluation.samples}"
        # A resumed run may ask for another number of samples than were scored so far.
        scores = {step: row for step, row in _validation(config.folder.evaluations).items() if key in row}
        kept |= set(evaluated_steps(config)) - scores.keys()
        if scores:
            kept.add(select_step(scores, key))
    for step in found.keys() - kept:
        shutil.rmtree(found[step])


def _validation(path: Path) -> dict[int, dict[str, Any]]:
    """The figures by step. A last line that is still being written is left out."""
    return {row["step"]: row["figures"] for row in read_rows(path) if row["split"] == "validation"}
