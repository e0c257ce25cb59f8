"""Which problem is sampled when: a pure function of seed and step, so that a restarted solver repeats its batch."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from stepalign.types import Problem


@dataclass(frozen=True)
class Draw:
    """One completion to sample. ``sample`` tells apart draws of the same problem within a batch; those of one group
    are published together."""

    problem: Problem
    sample: int
    group: int = 0


class ProblemSchedule:
    """Epoch after epoch in a seeded order, each problem once an epoch, in groups of ``group_size`` samples.

    The order of problems does not depend on the group size. ``batch`` counts samples and is a multiple of it.
    """

    def __init__(self, problems: Sequence[Problem], batch: int, seed: int, group_size: int = 1) -> None:
        self.problems = sorted(problems, key=lambda problem: problem.id)
        self.groups = batch // group_size
        self.group_size = group_size
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
        for position in range(step * self.groups, (step + 1) * self.groups):
            problem = self._at(position)
            group = seen[problem.id] // self.group_size
            for _ in range(self.group_size):
                draws.append(Draw(problem, seen[problem.id], group))
                seen[problem.id] += 1
        return draws
