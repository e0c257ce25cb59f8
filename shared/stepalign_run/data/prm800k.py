"""PRM800K, phase 2: solutions of MATH problems, rated step by step up to the first wrong one.

Source of the form: the README of ``openai/prm800k`` on GitHub (Lightman et al. 2023, arXiv 2305.20050). The attempt is
``question.pre_generated_steps``. Of each ``label.steps[i].completions`` the one with the attempt's own text counts; the
others are alternatives that people rated after the first mistake. ``rating`` −1 is wrong, 0 and 1 are not.

Left out and counted: solutions whose labelling ended early (``finish_reason`` ``give_up``, ``bad_problem``) or whose
steps are not all rated up to the first wrong one. Phase 1 is refused: its solutions are put together from alternatives
that a person has chosen, so none of them is wrong.
"""

from __future__ import annotations

from typing import Any, cast

from stepalign_run.data.labelled import LabelledSolution, LeftOutError, labelled

NAME = "prm800k"
_WRONG = -1
_NEVER_LABELLED = ("give_up", "bad_problem")


def recognises(row: dict[str, Any]) -> bool:
    return isinstance(row.get("question"), dict) and isinstance(row.get("label"), dict)


def read(row: dict[str, Any]) -> LabelledSolution:
    """Raises ValueError with what is wrong with the row, and LeftOutError for one without a usable label."""
    question = cast("dict[str, Any]", row["question"])
    steps: Any = question.get("pre_generated_steps")
    if steps is None:
        raise ValueError("question.pre_generated_steps: missing, as in phase 1; use the files of phase 2")
    if not isinstance(steps, list):
        raise ValueError("question.pre_generated_steps: no list of steps")
    return labelled(
        question=question.get("problem"),
        steps=cast("list[object]", steps),
        first_error=_first_error(cast("dict[str, Any]", row["label"]), cast("list[object]", steps)),
        reference_solution=question.get("ground_truth_solution"),
        answer=question.get("ground_truth_answer"),
    )


def _first_error(label: dict[str, Any], steps: list[object]) -> int | None:
    reason: Any = label.get("finish_reason")
    if reason in _NEVER_LABELLED:
        raise LeftOutError(f"labelling ended with {reason}")
    rated: Any = label.get("steps")
    if not isinstance(rated, list):
        raise ValueError("label.steps: no list")
    for place, (step, given) in enumerate(zip(cast("list[Any]", rated), steps, strict=False)):
        rating = _rating(step, given)
        if rating is None:
            raise LeftOutError("a step before the first wrong one has no rating")
        if rating == _WRONG:
            return place
    if len(cast("list[Any]", rated)) < len(steps):
        raise LeftOutError("no wrong step, and not rated to the end")
    return None


def _rating(step: Any, given: object) -> int | None:
    """The rating of the attempt's own step; None where it has none."""
    completions: Any = cast("dict[str, Any]", step).get("completions") if isinstance(step, dict) else None
    if not isinstance(completions, list):
        raise ValueError("label.steps: each needs a list of completions")
    known = [cast("dict[str, Any]", each) for each in cast("list[Any]", completions) if isinstance(each, dict)]
    return next((each.get("rating") for each in known if _same(each.get("text"), given)), None)


def _same(left: object, right: object) -> bool:
    return isinstance(left, str) and isinstance(right, str) and left.split() == right.split()
