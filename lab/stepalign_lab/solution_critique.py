"""The perfect critique of a rollout, where the solution is known step by step.

A step is right when it states the next fact of the solution in one of its wordings. The critique copies right steps
verbatim, writes the first wrong one correctly and continues to the answer; rewritten and continued steps take the
wording of the last *correct* step, else the first wording (taking it from a malformed step makes traces drift to the
reference's wording).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stepalign.critique.trace import TaggedStep, Trace, parse_trace

# Between digits whitespace separates numbers; elsewhere it says nothing.
_IDLE_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")


@dataclass(frozen=True)
class Solution:
    """The true steps of one problem.

    ``wordings`` holds the bodies of all steps once per wording, the solver's own first. ``between`` stands between the
    elements of a critique, ``inside`` between a tag and its content.
    """

    wordings: Mapping[str, Sequence[str]]
    answer: str
    between: str = " "
    inside: str = " "

    @property
    def length(self) -> int:
        return len(next(iter(self.wordings.values())))

    def wording_of(self, body: str, position: int) -> str | None:
        """The wording in which ``body`` states the fact at ``position``, or None."""
        if position >= self.length:
            return None
        packed = _pack(body)
        return next((name for name, bodies in self.wordings.items() if _pack(bodies[position]) == packed), None)

    def wording_begun(self, body: str, position: int, last: str) -> str | None:
        """The wording in which ``body`` can be continued to the fact at ``position``, preferring the last one used."""
        if position >= self.length:
            return None
        packed = _pack(body)
        names = sorted(self.wordings, key=lambda name: name != last)
        return next((name for name in names if _pack(self.wordings[name][position]).startswith(packed)), None)

    def marked(self, bodies: list[str], marks: list[str], verdict: str) -> str:
        """``marks`` may be longer than ``bodies``: the extra ones mark no step and are dropped."""
        pad = self.inside
        pairs = enumerate(zip(bodies, marks, strict=False), start=1)
        steps = [f"<step_{i}>{pad}{body}{pad}</step_{i}>{pad}<{mark}/>" for i, (body, mark) in pairs]
        closing = f"<answer>{pad}{self.answer}{pad}</answer>", f"<verdict>{pad}{verdict}{pad}</verdict>"
        return self.between.join([*steps, *closing])


def _pack(body: str) -> str:
    return _IDLE_SPACE.sub("", body.strip())


def _finished(begun: str, body: str) -> str:
    """``begun`` as it stands, then the rest of ``body``, which begins with ``begun`` but for whitespace."""
    start = begun.strip()
    written = r"\s*".join(map(re.escape, re.sub(r"\s", "", start)))
    match = re.match(rf"\s*{written}", body)
    return start + body[match.end() :] if match is not None else body


def critique_of(solution: Solution, attempt: str) -> str:
    """The critique text of an attempt, in the format that every critic writes."""
    trace = parse_trace(attempt)
    copied, wording = _right_steps(solution, trace)
    rest = list(solution.wordings[wording][len(copied) :])
    copies = ["copied"] * len(copied)
    all_copied = len(copied) == len(trace.complete_steps)

    if not all_copied or (trace.answer is not None and rest):
        if trace.answer is not None and trace.answer.body == solution.answer and _numbered(trace):
            inserted = _with_missing_steps(solution, trace)
            if inserted is not None:
                return solution.marked(*inserted, "unjustified")
        # With all steps copied, the attempt answers too early and wrongly: its answer is the error.
        first = "inserted" if all_copied else "corrected"
        return solution.marked(copied + rest, copies + [first] + ["continued"] * len(rest), "incorrect")
    if trace.answer is not None:
        return solution.marked(copied, copies, "correct" if trace.answer.body == solution.answer else "incorrect")
    verdict, first = "incomplete", "continued"
    unfinished = trace.unfinished
    if unfinished is not None:
        begun = _begun(solution, unfinished, len(copied), wording)
        if begun is None:
            verdict, first = "incorrect", "corrected"
        else:
            rest = begun
    return solution.marked(copied + rest, copies + [first] + ["continued"] * len(rest), verdict)


def _begun(solution: Solution, unfinished: TaggedStep, position: int, last: str) -> list[str] | None:
    """The steps from the unfinished one on, or None when it cannot be continued to a right one."""
    wording = solution.wording_begun(unfinished.body, position, last)
    if wording is None or unfinished.number != position + 1:
        return None
    first, *others = solution.wordings[wording][position:]
    return [_finished(unfinished.body, first), *others]


def _with_missing_steps(solution: Solution, trace: Trace) -> tuple[list[str], list[str]] | None:
    """Case B: the steps are true facts in order with some left out. Bodies and marks of the critique."""
    bodies: list[str] = []
    marks: list[str] = []
    wording = next(iter(solution.wordings))

    def insert(position: int) -> None:
        bodies.append(solution.wordings[wording][position])
        marks.append("inserted")

    position = 0
    for step in trace.steps:
        found = None
        while found is None and position < solution.length:
            found = solution.wording_of(step.body, position)
            if found is None:
                insert(position)
            position += 1
        if found is None:
            return None
        wording = found
        bodies.append(step.body.strip())
        marks.append("copied")
    for missing in range(position, solution.length):
        insert(missing)
    return (bodies, marks) if "inserted" in marks else None


def _numbered(trace: Trace) -> bool:
    return all(step.closed and step.number == i for i, step in enumerate(trace.steps, start=1))


def _right_steps(solution: Solution, trace: Trace) -> tuple[list[str], str]:
    """Bodies of the complete steps before the first wrong one, and the wording of the last of them."""
    copied: list[str] = []
    wording = next(iter(solution.wordings))
    for position, step in enumerate(trace.complete_steps):
        found = solution.wording_of(step.body, position)
        if found is None or not step.closed or step.number != position + 1:
            break
        wording = found
        copied.append(step.body.strip())
    return copied, wording
