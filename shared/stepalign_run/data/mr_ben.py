"""Mr-Ben: solutions of exam questions in seven subjects, labelled by people.

Source of the form: the README and ``data/*.json`` of ``dvlab-research/Mr-Ben`` on GitHub (Zeng et al. 2024, arXiv
2406.13975). A file there is one object that holds each question's solutions in a list; on the Hugging Face hub
(``Randolphzeng/Mr-Ben``) the solutions are rows. ``Model_Solution_First_Error_Step`` counts from 1, as text, and is
``N/A`` where ``Model_Solution_Correctness`` is ``correct``. The options belong to the question. The known answer is
``Ground_Truth_Answer_Modified``, by which people labelled, where there is one.

Left out and counted: the subject coding, whose solutions are programs and not lists of steps, and solutions whose first
wrong step is no number.
"""

from __future__ import annotations

from typing import Any

from stepalign_run.data.labelled import LabelledSolution, LeftOutError, labelled

NAME = "mr_ben"
_NONE = "n/a"


def recognises(row: dict[str, Any]) -> bool:
    return "Model_Solution_Steps" in row


def read(row: dict[str, Any]) -> LabelledSolution:
    """Raises ValueError with what is wrong with the row, and LeftOutError for one without a usable label."""
    if isinstance(row["Model_Solution_Steps"], str):
        raise LeftOutError("a program in place of steps")
    options = row.get("Options")
    question = row.get("Question")
    if isinstance(question, str) and isinstance(options, str) and options.strip():
        question = f"{question}\n{options}"
    uuid, model = row.get("Question_UUID"), row.get("Sampled_Model")
    return labelled(
        question=question,
        steps=row["Model_Solution_Steps"],
        first_error=first_error(row, "Model_Solution_Correctness", "Model_Solution_First_Error_Step"),
        id=f"{uuid}/{model}" if isinstance(uuid, str) and isinstance(model, str) else None,
        reference_solution=row.get("Ground_Truth_Analysis"),
        answer=row.get("Ground_Truth_Answer_Modified") or row.get("Ground_Truth_Answer"),
        generator=model,
    )


def first_error(row: dict[str, Any], correctness: str, step: str) -> int | None:
    """The label, from 0. Raises ValueError where the two columns ``correctness`` and ``step`` contradict each other.

    A step that is no number raises LeftOutError.
    """
    is_right = str(row.get(correctness)).strip().lower() == "correct"
    place = str(row.get(step)).strip()
    if place.lower() == _NONE:
        if not is_right:
            raise ValueError(f"{step} is N/A, but {correctness} is {row.get(correctness)!r}; one of the two is wrong")
        return None
    if is_right:
        raise ValueError(f"{correctness} is 'correct', but {step} is {place!r}; one of the two is wrong")
    if not place.isdecimal() or not place.isascii():
        raise LeftOutError("a first wrong step that is no number")
    if int(place) == 0:
        raise ValueError(f"{step} is 0; it counts from 1")
    return int(place) - 1
