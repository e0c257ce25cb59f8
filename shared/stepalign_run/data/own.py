"""Our own form: what docs/critic-quality.md describes. Unknown columns are refused, as in problem files."""

from __future__ import annotations

from typing import Any

from stepalign_run.data.labelled import LabelledSolution, labelled

NAME = "stepalign"
COLUMNS = ("question", "steps", "first_error", "reference_solution", "answer", "generator", "id")


def recognises(row: dict[str, Any]) -> bool:
    return "first_error" in row


def read(row: dict[str, Any]) -> LabelledSolution:
    """Raises ValueError with what is wrong with the row."""
    unknown = [name for name in row if name not in COLUMNS]
    if unknown:
        raise ValueError(f"unknown: {', '.join(map(repr, unknown))}; remove it (known are {', '.join(COLUMNS)})")
    if "first_error" not in row:
        raise ValueError("first_error: missing; write the first wrong step, counted from 0, or null")
    return labelled(**{"question": None, "steps": None, **row})
