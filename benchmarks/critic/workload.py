"""The request of the HTTP measurements: an attempt of eight steps with a reference solution, and its critique.

Requests differ in their question alone, so that one text is the right correction of each of them. They outnumber the
answers that the service keeps: asked for in turn, none is ever found in its cache. Their attempt is one that the
process has just read; what reading an attempt takes is a figure of :mod:`benchmarks.bench_attempts`.
"""

from __future__ import annotations

from stepalign.types import CritiqueRequest

# Twice the default of critic.cache_entries.
DIFFERENT_REQUESTS = 2048

_QUESTION = (
    "Class {number} of the school goes on a trip of three days. The coach costs 1,260 dollars for all three days "
    "together. Each of the 28 children sleeps two nights in the hostel at 23 dollars a night and eats three lunches at "
    "6 dollars each. Two teachers come along; they pay the same for the hostel and nothing for lunch. A museum asks "
    "4 dollars of every child and lets teachers in for free. The parents' association gives 500 dollars, and what is "
    "left is divided evenly among the children. How much does each child's family pay, in dollars, rounded to cents?"
)
_REFERENCE = (
    "30 people sleep two nights: 30 * 2 * 23 = 1,380 dollars for the hostel. The children's lunches cost 28 * 3 * 6 = "
    "504 dollars, the museum 28 * 4 = 112 dollars. With the coach that is 1,260 + 1,380 + 504 + 112 = 3,256 dollars. "
    "The association gives 500 dollars, so 2,756 dollars are left. Among 28 families these are 2,756 / 28 = 98.43 "
    "dollars each, rounded to cents."
)
_COPIED = (
    "First I count who sleeps in the hostel: the 28 children and the 2 teachers, so that is 28 + 2 = 30 people in all.",
    "Each of them stays for two nights at 23 dollars a night, which comes to 2 * 23 = 46 dollars for every person.",
    "For all 30 people the hostel therefore costs 30 * 46 = 1,380 dollars, teachers included, as the problem says.",
    "Only the children eat lunch at the class's cost: three lunches are 18 dollars, so 28 * 18 = 504 dollars.",
    "The museum is free for teachers and asks 4 dollars of each child; the tickets cost 28 * 4 = 112 dollars together.",
)
_WRONG = (
    "Now I add up everything with the coach: 1,260 + 1,380 + 504 + 112 = 3,156 dollars is the cost of the whole trip."
)
_RIGHT = (
    "Now I add up everything with the coach: 1,260 + 1,380 + 504 + 112 = 3,256 dollars is the cost of the whole trip."
)
_WENT_ON = (
    "The parents' association pays 500 dollars of this, so the families have to pay 3,156 - 500 = 2,656 dollars.",
    "Divided evenly among the 28 families this is 2,656 / 28 = 94.857 dollars, and rounded to cents that is 94.86.",
)
_PUT_RIGHT = (
    "The parents' association pays 500 dollars of this, so the families have to pay 3,256 - 500 = 2,756 dollars.",
    "Divided evenly among the 28 families this is 2,756 / 28 = 98.429 dollars, and rounded to cents that is 98.43.",
)


def requests(count: int = DIFFERENT_REQUESTS) -> list[CritiqueRequest]:
    """Different requests of about two kilobytes each, their attempts numbered as chat models write them."""
    steps = (*_COPIED, _WRONG, *_WENT_ON)
    attempt = "\n".join([*(f"{i}. {step}" for i, step in enumerate(steps, 1)), "The answer is 94.86"])
    return [
        CritiqueRequest(
            question=_QUESTION.format(number=number), attempt=attempt, reference_solution=_REFERENCE, answer="98.43"
        )
        for number in range(count)
    ]


WRONG_STEP = len(_COPIED) + 1
"""The step (from 1) at which the attempt goes wrong."""


def correction() -> str:
    """What a perfect critic writes in the place of that step and of those that follow it."""
    steps = [f"<step_{i}>{step}</step_{i}>" for i, step in enumerate((_RIGHT, *_PUT_RIGHT), WRONG_STEP)]
    return "\n".join([*steps, "<answer>98.43</answer>"])


def is_wrong_step(shown: str) -> bool:
    """Whether a message of the conversation shows that step."""
    return shown.endswith(_WRONG)
