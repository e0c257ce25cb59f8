"""Where answers are compared: on the event loop, or in a thread where the grader may take its time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from stepalign.critique.answers import Grader, Judgement, answers_equal
from stepalign.plugins import load_grader
from stepalign_critic.judging import Judge


def knows_nothing(_answer: str, _known_answer: str) -> None:
    return None


class Hesitant:
    """Knows "5" at once, and that it will think about all else."""

    def __call__(self, answer: str, known_answer: str, /) -> Judgement:
        return answer == known_answer if answer == "5" else None

    def at_once(self, answer: str, known_answer: str, /) -> bool:
        return answer == "5"


def run(grader: Grader, work: Callable[[Grader], object]) -> tuple[object, list[bool], int]:
    """The result, for each time that the work was begun whether that was in the loop's thread, and the unknown ones."""
    judge = Judge(grader)
    here, begun, unknown = threading.get_ident(), list[bool](), list[None]()
    judge.on_unknown = lambda: unknown.append(None)

    def noted(asked: Grader) -> object:
        begun.append(threading.get_ident() == here)
        return work(asked)

    return asyncio.run(judge.run(noted)), begun, len(unknown)


@pytest.mark.parametrize(
    ("grader", "answer", "begun"),
    [
        (answers_equal, "94.86", [True]),
        (load_grader("math"), "94.86", [True]),
        (load_grader("math"), "12 students", [True]),
        (load_grader("math"), "x + 1", [True, False]),
        (knows_nothing, "98.43", [True, False]),
    ],
    ids=["exact", "math: numbers", "math: units", "math: algebra", "one that does not tell"],
)
def test_only_a_grader_that_may_take_its_time_gets_a_thread(grader: Grader, answer: str, begun: list[bool]) -> None:
    said, found, _ = run(grader, lambda asked: asked(answer, "y + 2" if answer == "x + 1" else "12 teachers"))
    assert not said and found == begun


def test_work_that_is_begun_anew_counts_what_is_unknown_once() -> None:
    def work(asked: Grader) -> list[Judgement]:
        return [asked("5", "5"), asked("six", "seven"), asked("8", "9")]

    assert run(Hesitant(), work) == ([True, None, None], [True, False], 2)


def test_a_grader_that_fails_is_unknown_and_other_errors_are_raised() -> None:
    def fails(_answer: str, _known_answer: str) -> bool:
        raise OSError("no process")

    assert run(fails, lambda asked: asked("1", "2")) == (None, [True, False], 1)
    with pytest.raises(ZeroDivisionError):
        run(answers_equal, lambda asked: 1 / 0)
