"""The lab's domain: chains of digit operations, evaluated left to right, every result modulo 10.

A question ``3 + 4 * 7`` is solved in steps, in one of two wordings:

- ``own``: ``<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 9 </step_2> <answer> 9 </answer>``
- ``reference``: the same facts said differently, ``7 is 4 + of 3``. A reference solution joins them by ``;`` and ends
  with ``so 9``; it has no step tags.

Words are separated by one space, so that text and the word-level tokenizer's tokens map one to one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

OPERATORS = ("+", "-", "*")
MIN_OPERATIONS, MAX_OPERATIONS = 4, 6

Wording = Literal["own", "reference"]
Fact = tuple[int, str, int]
FACTS: tuple[Fact, ...] = tuple((a, op, b) for op in OPERATORS for a in range(10) for b in range(10))


def apply(a: int, op: str, b: int) -> int:
    """The true result of ``a op b`` modulo 10."""
    return {"+": a + b, "-": a - b, "*": a * b}[op] % 10


@dataclass(frozen=True)
class Chain:
    """A question: a first digit and the operations applied to it in order."""

    start: int
    operations: tuple[tuple[str, int], ...]

    @property
    def question(self) -> str:
        return " ".join([str(self.start), *(f"{op} {b}" for op, b in self.operations)])

    def results(self, table: dict[Fact, int] | None = None) -> list[int]:
        """The value after each operation, by the true facts or by a table of (possibly wrong) ones."""
        values: list[int] = []
        value = self.start
        for op, b in self.operations:
            value = apply(value, op, b) if table is None else table[value, op, b]
            values.append(value)
        return values


def parse_question(question: str) -> Chain:
    """Read ``3 + 4 * 7``. Raises ValueError when it is no chain of digits."""
    words = question.split()
    digits, operators = words[::2], words[1::2]
    valid = (
        len(words) >= 3
        and len(words) % 2 == 1
        and all(len(d) == 1 and d in "0123456789" for d in digits)
        and all(op in OPERATORS for op in operators)
    )
    if not valid:
        raise ValueError(f"{question!r} is no chain of digits and operators such as '3 + 4 * 7'")
    return Chain(int(digits[0]), tuple(zip(operators, map(int, digits[1:]), strict=True)))


def sample_chain(rng: random.Random) -> Chain:
    count = rng.randint(MIN_OPERATIONS, MAX_OPERATIONS)
    operations = tuple((rng.choice(OPERATORS), rng.randrange(10)) for _ in range(count))
    return Chain(rng.randrange(10), operations)


def word_fact(a: int, op: str, b: int, result: int, wording: Wording) -> str:
    return f"{a} {op} {b} = {result}" if wording == "own" else f"{result} is {b} {op} of {a}"


def step_bodies(chain: Chain, results: list[int], wording: Wording) -> list[str]:
    """The text of each step; ``results`` may be wrong, each step starts from the result before it."""
    befores = [chain.start, *results]
    return [
        word_fact(before, op, b, result, wording)
        for before, (op, b), result in zip(befores, chain.operations, results, strict=False)
    ]


def tagged(bodies: list[str], answer: int | str | None) -> str:
    """Step bodies and an answer as step-tagged text in the lab's spacing."""
    parts = [f"<step_{i}> {body} </step_{i}>" for i, body in enumerate(bodies, start=1)]
    if answer is not None:
        parts.append(f"<answer> {answer} </answer>")
    return " ".join(parts)


def reference_solution(chain: Chain, results: list[int] | None = None) -> str:
    values = chain.results() if results is None else results
    return " ; ".join([*step_bodies(chain, values, "reference"), f"so {values[-1]}"])


def wrong_facts(seed: int, share: float = 0.2) -> dict[Fact, int]:
    """The facts that the lab's solver has learned wrongly, with the wrong result of each."""
    rng = random.Random(f"wrong facts {seed}")
    chosen = rng.sample(FACTS, round(share * len(FACTS)))
    return {fact: rng.choice([v for v in range(10) if v != apply(*fact)]) for fact in chosen}
