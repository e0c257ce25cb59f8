"""Which problem is sampled when: a pure function of seed and step, so that a restarted solver repeats its batch."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from stepalign.types import Problem


@dataclass(frozen=True)
class Draw:
    """One completion to sample. ``sample`` tells apart draws of the same problem within a batch."""

    problem: Problem
    sample: int


class ProblemSchedule:
    """Epoch after epoch in a seeded order, each problem once an epoch."""

    def __init__(self, problems: Sequence[Problem], batch: int, seed: int) -> None:
        self.problems = sorted(problems, key=lambda problem: problem.id)
        self.batch = batch
        self.seed = seed
        self._orders: dict[int, list[int]] = {}

    def _at(self, position: int) -> Problem:
        epoch, offset = divmod(position, len(self.problems))
        if epoch not in self._orders:
            order = list(range(len(self.problems)))
            random.Random(f"problem order {self.seed} {epoch}").shuffle(order)
            self._orders[epoch] = order
        return self.problems[self._orders[epoch][offset]]

    def draws(self, step: int) -> list[Draw]:
        """The batch of update ``step`` (from 0)."""
        seen: Counter[str] = Counter()
        draws: list[Draw] = []
        for position in range(step * self.batch, (step + 1) * self.batch):
            problem = self._at(position)
            draws.append(Draw(problem, seen[problem.id]))
            seen[problem.id] += 1
        return draws
