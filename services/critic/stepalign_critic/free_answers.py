"""What a critic wrote in free decoding → the critique that follows its thinking."""

from __future__ import annotations

from collections.abc import Iterator

from stepalign.critique.alignment import validate_critique
from stepalign.critique.answers import Grader, answers_equal
from stepalign.types import Critique, CritiqueFailure, FailureReason
from stepalign_critic.backends.base import Generation

_THINK, _END_THINK = "<think>", "</think>"


def read_answer(
    generation: Generation, attempt: str, known_answer: str | None, grader: Grader = answers_equal
) -> Critique | CritiqueFailure:
    """A backend's text → the critique that follows its thinking, validated against the tagged attempt.

    Thinking ends at the last ``</think>``. Where the attempt itself holds that tag, a copy of it holds it too. Then the
    first valid text is taken, of these: the text after the last tag, after the one before it and so on, and all of it.
    A failure's detail ends in the backend's remark, if there is one.
    """
    read = _read_text(generation, attempt, known_answer, grader)
    if isinstance(read, Critique) or generation.remark is None:
        return read
    return read.model_copy(update={"detail": f"{read.detail}; {generation.remark}"})


def _read_text(
    generation: Generation, attempt: str, known_answer: str | None, grader: Grader
) -> Critique | CritiqueFailure:
    read: Critique | CritiqueFailure | None = None
    for answer in _answers(generation.text, attempt):
        read = validate_critique(
            answer,
            attempt,
            known_answer=known_answer,
            critic_finish_reason=generation.finish_reason,
            grader=grader,
        )
        if isinstance(read, Critique):
            return read
    if read is None:
        return CritiqueFailure(
            reason=FailureReason.TRUNCATED, detail="the critic's thinking never ended", text=generation.text
        )
    return read


def _answers(text: str, attempt: str) -> Iterator[str]:
    """The parts of ``text`` that may be the answer; none when all of it is thinking."""
    before, ended, answer = text.rpartition(_END_THINK)
    if ended:
        yield answer
        while _END_THINK in attempt and _END_THINK in before:
            before = before.rpartition(_END_THINK)[0]
            yield text[len(before) + len(_END_THINK) :]
    if not text.lstrip().startswith(_THINK) and (not ended or _END_THINK in attempt):
        yield text
