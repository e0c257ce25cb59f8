"""Rules without a model that are told the known answer: what a critic has to beat.

All three say "no error" where the attempt's answer is the known one. Where it is not, there is an error, and they place
it. A prediction is a distribution over steps, so that chance is computed and not drawn: the accuracy of a row is the
probability of its label.

=========================== =========================================================================================
``answer_then_uniform``     any step, all alike
``best_fixed_place``        always one place, from the front or from the end: the best one of the dev half
``first_unseen_number``     the first step with a number that stands in neither question nor reference solution; the
                            last step where there is none
=========================== =========================================================================================

Where a row has no known answer, or its attempt states none, the answer counts as wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from stepalign import answers_equal, join_steps
from stepalign_run.data import LabelledSolution

NO_STEP = -1
Distribution = dict[int, float]
"""Probabilities of steps, from 0; ``NO_STEP`` is no error."""

Place = Callable[[LabelledSolution], Distribution]

_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def given_the_answer(solution: LabelledSolution, place: Place) -> Distribution:
    """No error where the attempt's answer is the known one, else a step by ``place``."""
    split = join_steps(solution.steps)
    stated = None if split.answer is None else split.text[slice(*split.answer)]
    is_right = stated is not None and solution.answer is not None and same_answer(stated, solution.answer)
    return {NO_STEP: 1.0} if is_right else place(solution)


def same_answer(stated: str, known: str) -> bool:
    """Whether two answers are equal, or their only numbers are: attempts write ``\\$65,960`` and ``12 eggs``."""
    if answers_equal(stated, known):
        return True
    numbers = [_NUMBER.findall(text) for text in (stated, known)]
    return all(len(found) == 1 for found in numbers) and answers_equal(numbers[0][0], numbers[1][0])


def uniform(solution: LabelledSolution) -> Distribution:
    return dict.fromkeys(range(len(solution.steps)), 1.0 / len(solution.steps))


def fixed(place: int) -> Place:
    """Always this place: from the front, or from the end where it is negative; the nearest one that there is."""

    def at(solution: LabelledSolution) -> Distribution:
        last = len(solution.steps) - 1
        return {max(0, min(last, place if place >= 0 else last + 1 + place)): 1.0}

    return at


def unseen_number(solution: LabelledSolution) -> Distribution:
    seen = _numbers(solution.question) | _numbers(solution.reference_solution or "")
    for index, step in enumerate(solution.steps):
        if _numbers(step) - seen:
            return {index: 1.0}
    return {len(solution.steps) - 1: 1.0}


def best_fixed_place(dev: Sequence[LabelledSolution], most: int = 10) -> int:
    """The place that is right most often on erroneous solutions; of equal ones the nearest to the front."""
    erroneous = [solution for solution in dev if solution.first_error is not None]
    places = [*range(most), *range(-1, -most - 1, -1)]
    return max(places, key=lambda place: sum(fixed(place)(one).get(one.first_error or 0, 0.0) for one in erroneous))


def _numbers(text: str) -> set[str]:
    """The numbers in a text, without commas and needless zeros."""
    found = (number.replace(",", "") for number in _NUMBER.findall(text))
    return {number.rstrip("0").rstrip(".") if "." in number else number.lstrip("0") or "0" for number in found}
