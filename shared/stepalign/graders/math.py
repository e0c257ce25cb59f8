r"""The grader ``math``: answers are equal when they mean the same number, expression, set, interval or word.

Steps, each taken only where the one before it has not decided:

1. An empty answer equals nothing. What ``answers_equal`` finds equal is equal. Of more than ``MAX_CHARACTERS`` nothing
   else is: a text that long is no answer in another dress.
2. Both answers in their plain form (:mod:`stepalign.graders.plain`). Two exact numbers are compared as such; words are
   compared as words, never as products of letters.
3. `math-verify <https://github.com/huggingface/Math-Verify>`_ compares what is left, in a process that the kernel
   limits in CPU time and memory (:mod:`stepalign.graders.pool`).

None, "unknown", is said of an answer that costs more than the limits, of equal numbers with unlike units, and of
numbers in words (``12 million``). A unit or a name on one side alone changes nothing: ``x = 12 cm`` is 12. A percentage
equals its number and its hundredth. A decimal equals what it writes, not what it approximates: 0.333 is not 1/3.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal, NamedTuple

from stepalign.critique.answers import Judgement, answers_equal
from stepalign.errors import ConfigError
from stepalign.graders.plain import Plain, plain
from stepalign.graders.pool import Pool, WorkerLostError

if find_spec("math_verify") is None:
    raise ConfigError(
        "the grader 'math' needs math-verify: pip install 'stepalign[math]', or set data.grader (of a critic "
        "critic.grader) to 'exact'"
    )

MAX_CHARACTERS = 1000
"""A longer answer is compared as text alone."""
POOL = Pool(min(4, os.cpu_count() or 1))
"""The workers of this process; none runs before the first question."""
AT_ONCE_CHARACTERS = 100
"""Of longer answers it is not foretold whether they are compared at once: their plain form may take a while itself."""


class MathGrader:
    """The grader, which can tell beforehand whether a process will be asked."""

    def __call__(self, answer: str, known_answer: str, /) -> Judgement:
        """Whether two answers are the same; None where that is unknown. For any thread; it may take seconds.

        Raises GraderError where no process can be started to compare them.
        """
        if not answer.strip() or not known_answer.strip():
            return False
        if answers_equal(answer, known_answer):
            return True
        if max(len(answer), len(known_answer)) > MAX_CHARACTERS:
            return False
        said = _said(answer, known_answer)
        if not isinstance(said, _Question):
            return said
        # Outside of what is cached: a worker that is lost says nothing of the answers.
        with suppress(WorkerLostError):
            return _said_by_a_process(said)
        return None

    def at_once(self, answer: str, known_answer: str, /) -> bool:
        """Whether no process is needed for the judgement, of answers that are no longer than most."""
        if max(len(answer), len(known_answer)) > AT_ONCE_CHARACTERS:
            return False
        return answers_equal(answer, known_answer) or not isinstance(_said(answer, known_answer), _Question)


math_equal = MathGrader()


class _Question(NamedTuple):
    """Two values that only algebra can compare; ``unlike``: their units differ."""

    ours: str
    theirs: str
    unlike: bool


# The samples of a problem repeat few answers, and every one of them is asked about again as checkpoints are evaluated.
@lru_cache(maxsize=4096)
def _said(answer: str, known_answer: str) -> Judgement | _Question:
    ours, theirs = plain(answer), plain(known_answer)
    if not ours.value or not theirs.value:
        return False
    if ours.name and theirs.name and ours.name != theirs.name:
        return False
    unlike = bool(ours.unit and theirs.unit and ours.unit != theirs.unit)
    same = _same_value(ours, theirs)
    if same == "algebra":
        return _Question(ours.value, theirs.value, unlike)
    return None if same and unlike else same


@lru_cache(maxsize=4096)
def _said_by_a_process(question: _Question) -> Judgement:
    same = POOL.ask(question.ours, question.theirs)
    return None if same and question.unlike else same


def _same_value(ours: Plain, theirs: Plain) -> Judgement | Literal["algebra"]:
    if ours.value.casefold() == theirs.value.casefold():
        return True
    a, b = ours.number, theirs.number
    if a is not None and b is not None:
        percents = (ours.unit == "%") - (theirs.unit == "%")
        return a == b or (percents == 1 and a / 100 == b) or (percents == -1 and a == b / 100)
    if ours.is_text or theirs.is_text:
        return None if ours.scales or theirs.scales else False
    return "algebra"
