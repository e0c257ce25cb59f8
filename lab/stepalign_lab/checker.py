"""The lab's exact critic."""

from __future__ import annotations

from stepalign_lab.domain import Wording, parse_question, step_bodies
from stepalign_lab.solution_critique import Solution, critique_of

WORDINGS: tuple[Wording, ...] = ("own", "reference")


def exact_critique(question: str, attempt: str) -> str:
    """The critique text of an attempt at a chain. Raises ValueError on no chain."""
    chain = parse_question(question)
    values = chain.results()
    bodies = {wording: step_bodies(chain, values, wording) for wording in WORDINGS}
    return critique_of(Solution(bodies, str(values[-1])), attempt)
