"""Work that compares answers, in a thread of its own only where the grader may take its time.

A thread costs a request more than all that most graders do: most answers are numbers. So the work is begun on the event
loop, and begun anew in a thread as soon as it meets a comparison that may take longer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from stepalign.critique.answers import Foretelling, Grader, Judgement, answers_equal, judged

Result = TypeVar("Result")
Foretold = Callable[[str, str], bool]


class Judge:
    """Compares answers by ``grader``. ``on_unknown`` is called for every comparison that it could not decide."""

    def __init__(self, grader: Grader) -> None:
        self._grader = grader
        self._at_once = _foretold(grader)
        self.on_unknown: Callable[[], None] = lambda: None

    async def run(self, work: Callable[[Grader], Result]) -> Result:
        """The result of ``work``, which compares answers by what it is given and has no other effect."""
        judging = _Judging(self._grader, self._at_once)
        try:
            return self._told(judging, work(judging))
        except _WouldWait:
            judging = _Judging(self._grader, _always)
        return self._told(judging, await asyncio.to_thread(work, judging))

    def _told(self, judging: _Judging, result: Result) -> Result:
        for _ in range(judging.unknown):
            self.on_unknown()
        return result


def _foretold(grader: Grader) -> Foretold:
    """What tells whether the grader judges two answers at once. Of one that does not tell it is never certain."""
    if grader is answers_equal:
        return _always
    return grader.at_once if isinstance(grader, Foretelling) else _never


def _always(_answer: str, _known_answer: str) -> bool:
    return True


def _never(_answer: str, _known_answer: str) -> bool:
    return False


class _WouldWait(BaseException):
    """A comparison may take its time. No Exception: one of a grader is taken for "unknown" where answers are judged."""


class _Judging:
    """The grader of one piece of work. ``unknown`` counts what it could not decide."""

    def __init__(self, grader: Grader, may_be_asked: Foretold) -> None:
        self._grader = grader
        self._may_be_asked = may_be_asked
        self.unknown = 0

    def __call__(self, answer: str, known_answer: str) -> Judgement:
        if not self._may_be_asked(answer, known_answer):
            raise _WouldWait
        said = judged(self._grader, answer, known_answer)
        self.unknown += said is None
        return said
