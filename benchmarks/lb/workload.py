"""The requests: chains of the lab with attempts that go wrong on the way, as a solver in training writes them."""

from __future__ import annotations

import random

from stepalign.types import CritiqueRequest
from stepalign_lab.domain import (
    OPERATORS,
    Chain,
    reference_solution,
    sample_chain,
    step_bodies,
    tagged,
    wrong_facts,
)


def lab_requests(count: int) -> list[CritiqueRequest]:
    """Different requests of the lab's usual size, some hundred bytes each."""
    rng = random.Random(0)
    return [_attempted(sample_chain(rng), seed) for seed in range(count)]


def long_request(operations: int = 60) -> CritiqueRequest:
    """One request of the size of a real one, some kilobytes. Its attempt is right, so that all of it is compared."""
    rng = random.Random(0)
    chain = Chain(rng.randrange(10), tuple((rng.choice(OPERATORS), rng.randrange(10)) for _ in range(operations)))
    values = chain.results()
    return CritiqueRequest(
        question=chain.question,
        attempt=tagged(step_bodies(chain, values, "own"), values[-1]),
        reference_solution=reference_solution(chain),
    )


def _attempted(chain: Chain, seed: int) -> CritiqueRequest:
    believed = wrong_facts(seed)
    true = chain.results()
    values: list[int] = []
    value = chain.start
    for op, b in chain.operations:
        value = believed.get((value, op, b), Chain(value, ((op, b),)).results()[0])
        values.append(value)
    return CritiqueRequest(
        question=chain.question,
        attempt=tagged(step_bodies(chain, values, "own"), values[-1]),
        answer=str(true[-1]),
    )
