"""MR-GSM8K (DiagGSM8K): solutions of GSM8K questions and of variations of them, labelled by people.

Source of the form: the README of ``dvlab-research/MR-GSM8K`` on GitHub (Zeng et al. 2023, arXiv 2312.17080), whose
``dataset/MR-GSM8k.json`` is a JSON array. ``model_output_solution_first_error_step`` counts from 1, and is ``N/A``
where ``model_output_solution_correctness`` is ``correct``.
"""

from __future__ import annotations

from typing import Any

from stepalign_run.data.labelled import LabelledSolution, labelled
from stepalign_run.data.mr_ben import first_error

NAME = "mr_gsm8k"


def recognises(row: dict[str, Any]) -> bool:
    return "model_output_steps" in row


def read(row: dict[str, Any]) -> LabelledSolution:
    """Raises ValueError with what is wrong with the row, and LeftOutError for one without a usable label."""
    return labelled(
        question=row.get("question"),
        steps=row["model_output_steps"],
        first_error=first_error(row, "model_output_solution_correctness", "model_output_solution_first_error_step"),
        id=row.get("uuid"),
        reference_solution=row.get("ground_truth_solution"),
        answer=row.get("ground_truth_answer"),
    )
