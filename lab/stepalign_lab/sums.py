"""Sums of one-digit numbers, a task narrow enough for a model of 135M parameters to almost know it.

A question ``7 + 8 + 5`` is solved by running totals, one addition a step::

    <step_1>7 + 8 = 15</step_1>
    <step_2>15 + 5 = 20</step_2>
    <answer>20</answer>

The reference solution says the same in words: ``7 and 8 make 15. Adding 5 gives 20. The sum is 20.``
"""

from __future__ import annotations

import itertools
import random
import re

from stepalign.errors import ConfigError
from stepalign_lab.solution_critique import Solution, critique_of

_QUESTION = re.compile(r"\d{1,3}(?: \+ \d{1,3})+")


def parse_addends(question: str) -> list[int]:
    """Read ``7 + 8 + 5``. Raises ValueError when it is no such sum."""
    if not _QUESTION.fullmatch(question):
        raise ValueError(f"{question!r} is no sum of numbers such as '7 + 8 + 5'")
    return [int(number) for number in question.split(" + ")]


def sum_critique(question: str, attempt: str) -> str:
    """The exact critique of an attempt at a sum. A step may name its two numbers in either order.

    Raises ValueError when the question is no sum.
    """
    addends = parse_addends(question)
    totals = list(itertools.accumulate(addends))
    steps = list(zip(totals, addends[1:], totals[1:], strict=False))
    wordings = {
        "total first": [f"{before} + {number} = {after}" for before, number, after in steps],
        "total second": [f"{number} + {before} = {after}" for before, number, after in steps],
    }
    return critique_of(Solution(wordings, str(totals[-1]), between="\n", inside=""), attempt)


def reference_solution(addends: list[int]) -> str:
    first, second, *others = addends
    total = first + second
    parts = [f"{first} and {second} make {total}."]
    for number in others:
        total += number
        parts.append(f"Adding {number} gives {total}.")
    return " ".join([*parts, f"The sum is {total}."])


def sample_sums(count: int, addends: int, seed: int) -> list[dict[str, str]]:
    """Rows of a problem file, no question twice. Raises ConfigError when there are not so many."""
    if not 2 <= addends <= 12:
        raise ConfigError(f"a sum of {addends} numbers; take 2 to 12")
    if count > 9**addends // 2:
        raise ConfigError(f"there are too few sums of {addends} one-digit numbers for {count} different ones")
    rng = random.Random(f"sums {seed}")
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        numbers = [rng.randint(1, 9) for _ in range(addends)]
        question = " + ".join(map(str, numbers))
        rows[question] = {
            "question": question,
            "answer": str(sum(numbers)),
            "reference_solution": reference_solution(numbers),
        }
    return list(rows.values())
