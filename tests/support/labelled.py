"""Labelled solutions, and a critic that answers them by a known pattern.

The critic's answer is the last word of the question: ``step1`` calls the first step wrong, ``answer`` the answer alone,
``right`` none, ``incomplete`` and ``unjustified`` say so, ``garbage`` is no critique, ``unable`` is refused, ``broken``
fails the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stepalign import CriticIdentity, CritiqueResponse, join_steps, validate_critique
from stepalign.critique.trace import Trace, parse_trace
from stepalign.types import AttemptReading, Critique, Usage
from stepalign_critic.backends.program import ProgramBackend
from stepalign_critic.service import CriticService
from stepalign_report.critic_quality.rows import Row, Told
from stepalign_report.critic_quality.summary import Measured, summarise
from stepalign_run.data import LabelledData, LabelledSolution


def critique_by_word(question: str, attempt: str) -> str:
    word, trace = question.split()[-1], parse_trace(attempt)
    if word == "unable":
        raise ValueError("no such question")
    if word == "broken":
        raise RuntimeError("the engine broke")
    if word == "garbage":
        return "I like it."
    answer = trace.answer.body if trace.answer is not None else "8"
    copies = [_step(step.number, step.body, "copied") for step in trace.steps]
    match word:
        case "right":
            return "".join(copies) + _end(answer, "correct")
        case "incomplete":
            return "".join(copies) + _step(len(copies) + 1, "and so on", "continued") + _end(answer, "incomplete")
        case "unjustified":
            return _step(1, "first of all", "inserted") + _shifted(trace) + _end(answer, "unjustified")
        case "answer":
            return "".join(copies) + _end("another", "incorrect")
        case _:
            at = int(word.removeprefix("step"))
            return "".join(copies[: at - 1]) + _step(at, "put right", "corrected") + _end("another", "incorrect")


def _step(number: int, body: str, mark: str) -> str:
    return f"<step_{number}>{body}</step_{number}><{mark}/>"


def _shifted(trace: Trace) -> str:
    return "".join(_step(step.number + 1, step.body, "copied") for step in trace.steps)


def _end(answer: str, verdict: str) -> str:
    return f"<answer>{answer}</answer><verdict>{verdict}</verdict>"


def word_critic(
    name: str = "words", critique: Callable[[str, str], str] = critique_by_word, settings: str | None = None
) -> CriticService:
    return CriticService(ProgramBackend(name, critique, "r1"), "chat-v1", settings=settings)


def solution(number: int, word: str, first_error: int | None, **fields: Any) -> dict[str, Any]:
    """A row of our own form with three steps and an answer; the critic answers by ``word``."""
    steps = [
        f"Take {number}.",
        f"Add 1 to get {number + 1}.",
        f"So it is {number + 1}, and the answer is {number + 1}.",
    ]
    return {"question": f"What is {number} + 1? {word}", "steps": steps, "first_error": first_error, **fields}


def quality_summary() -> dict[str, Any]:
    """``critic_quality.json`` of two critics on sixty solutions; the first is better, and gives probabilities."""
    solutions = [
        LabelledSolution(
            id=f"s{n}",
            question=f"What is {n} + 1?",
            steps=(f"Take {n}.", f"Add 1 to get {n + 1}.", f"That makes {n + 1}."),
            first_error=None if n % 3 == 0 else n % 3,
            generator="wrote <b>this</b>" if n % 2 else "m2",
        )
        for n in range(60)
    ]
    told = Told(reference_solution=True, answer=True)
    good, poor = (
        CriticIdentity(model=m, weights_revision="w", prompt_version="p", backend="b") for m in ("good", "poor")
    )
    measured = [
        Measured(good, told, {one.id: _row(one, good, n % 10 != 0, n) for n, one in enumerate(solutions)}),
        Measured(poor, told, {one.id: _row(one, poor, n % 10 < 4, None) for n, one in enumerate(solutions)}),
    ]
    data = LabelledData("labelled.jsonl", ("stepalign",), tuple(solutions), {})
    return summarise(data, solutions, measured, half=None, limit=None)


def _row(one: LabelledSolution, critic: CriticIdentity, is_right: bool, draw: int | None) -> Row:
    """An answer that is right, or else no critique. ``draw`` varies the probabilities; None gives none."""
    split = join_steps(one.steps)
    steps = "".join(_step(n, one.steps[n - 1], "copied") for n in range(1, (one.first_error or 0) + 1))
    if one.first_error is not None:
        text = steps + _step(one.first_error + 1, "put right", "corrected") + _end("another", "incorrect")
    else:
        text = "".join(_step(n, body, "copied") for n, body in enumerate(one.steps, start=1)) + _end("9", "incomplete")
    outcome = validate_critique(text if is_right else "no", split.tagged)
    valid = outcome if isinstance(outcome, Critique) else None
    p_wrong = None
    if draw is not None:
        p_wrong = [0.85 - draw % 4 * 0.1 if n == one.first_error else 0.1 + draw % 7 * 0.1 for n in range(3)]
    response = CritiqueResponse(
        id="crq_1",
        attempt=AttemptReading(
            rule=split.rule, steps=list(split.steps), answer=None, answer_rule=None, tagged=split.tagged
        ),
        critique=valid,
        failure=None if isinstance(outcome, Critique) else outcome,
        context=None if valid is None else valid.text,
        p_wrong=p_wrong,
        critic=critic,
        usage=Usage(prompt_tokens=300, completion_tokens=40 + len(one.id)),
    )
    return Row(id=one.id, seconds=0.5, response=response)
