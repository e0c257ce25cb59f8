"""ProcessBench: GSM8K, MATH, OlympiadBench and Omni-MATH solutions of twelve models, labelled by people.

Source of the form: Zheng et al. 2024, arXiv 2412.06559, and the card of ``Qwen/ProcessBench`` on the Hugging Face hub.
Columns: ``id``, ``generator``, ``problem``, ``steps``, ``final_answer_correct``, ``label`` (the first wrong step,
counted from 0; −1 where all are right). ``question`` in place of ``problem``, ``reference_solution`` and ``answer`` are
read where a file has them.
"""

from __future__ import annotations

from typing import Any

from stepalign_run.data.labelled import LabelledSolution, labelled

NAME = "processbench"
ALL_RIGHT = -1


def recognises(row: dict[str, Any]) -> bool:
    return "steps" in row and "label" in row and not isinstance(row["label"], dict)


def read(row: dict[str, Any]) -> LabelledSolution:
    """Raises ValueError with what is wrong with the row."""
    label = row.get("label")
    if not isinstance(label, int) or isinstance(label, bool) or label < ALL_RIGHT:
        raise ValueError(f"label: {label!r} is no step counted from 0, and not -1 for a solution that is all right")
    return labelled(
        question=row.get("problem", row.get("question")),
        steps=row.get("steps"),
        first_error=None if label == ALL_RIGHT else label,
        id=row.get("id"),
        reference_solution=row.get("reference_solution"),
        answer=row.get("answer"),
        generator=row.get("generator"),
    )
