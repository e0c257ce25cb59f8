"""BIG-Bench Mistake: chains of thought of PaLM 2 for five tasks of BIG-Bench, with their first logical mistake.

Source of the form: the README of ``WHGTyen/BIG-Bench-Mistake`` on GitHub (Tyen et al. 2023, arXiv 2311.08516). Columns:
``input``, ``steps``, ``target`` (the right answer), ``answer`` (the model's, which is not told to a critic) and
``mistake_index`` (from 0, null without a mistake).
"""

from __future__ import annotations

from typing import Any

from stepalign_run.data.labelled import LabelledSolution, labelled

NAME = "big_bench_mistake"


def recognises(row: dict[str, Any]) -> bool:
    return "mistake_index" in row


def read(row: dict[str, Any]) -> LabelledSolution:
    """Raises ValueError with what is wrong with the row."""
    if "mistake_index" not in row:
        raise ValueError("mistake_index: missing; write the first mistake, counted from 0, or null")
    return labelled(
        question=row.get("input"),
        steps=row.get("steps"),
        first_error=row["mistake_index"],
        answer=row.get("target"),
    )
