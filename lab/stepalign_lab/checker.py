"""The lab's exact critic: what a perfect critique of a rollout is, computed from the question.

A step is right when it states the next true fact in either wording. The critique copies right steps verbatim, writes
the first wrong one correctly and continues to the answer; rewritten and continued steps take the wording of the last
*correct* step, else the solver's own (taking it from a malformed step makes traces drift to the reference's wording).
"""

from __future__ import annotations

from stepalign.trace import Step, Trace, parse_trace
from stepalign_lab.domain import Chain, Wording, parse_question, step_bodies, word_fact

WORDINGS: tuple[Wording, ...] = ("own", "reference")


def _wording_of(body: str, chain: Chain, position: int, values: list[int]) -> Wording | None:
    """The wording in which ``body`` states the true fact at ``position``, or None."""
    if position >= len(chain.operations):
        return None
    before = values[position - 1] if position else chain.start
    op, b = chain.operations[position]
    for wording in WORDINGS:
        if body.split() == word_fact(before, op, b, values[position], wording).split():
            return wording
    return None


def _continuing(unfinished: Step, chain: Chain, position: int, values: list[int], last: Wording) -> Wording | None:
    """The wording in which the unfinished step can be continued to the true fact, preferring the last one used."""
    if position >= len(chain.operations):
        return None
    words = unfinished.body.split()
    for wording in sorted(WORDINGS, key=lambda w: w != last):
        if step_bodies(chain, values, wording)[position].split()[: len(words)] == words:
            return wording
    return None


def _marked(bodies: list[str], marks: list[str], answer: str, verdict: str) -> str:
    """``marks`` may be longer than ``bodies``: what is left over marks steps that there are none of."""
    pairs = enumerate(zip(bodies, marks, strict=False), start=1)
    steps = [f"<step_{i}> {body} </step_{i}> <{mark}/>" for i, (body, mark) in pairs]
    return " ".join([*steps, f"<answer> {answer} </answer>", f"<verdict> {verdict} </verdict>"])


def _missing_step_critique(chain: Chain, trace: Trace, values: list[int]) -> tuple[list[str], list[str]] | None:
    """Case B: the steps are true facts in order with some left out. Bodies and marks of the critique."""
    bodies: list[str] = []
    marks: list[str] = []
    wording: Wording = "own"

    def insert(position: int) -> None:
        bodies.append(step_bodies(chain, values, wording)[position])
        marks.append("inserted")

    position = 0
    for step in trace.steps:
        found = None
        while found is None and position < len(values):
            found = _wording_of(step.body, chain, position, values)
            if found is None:
                insert(position)
            position += 1
        if found is None:
            return None
        wording = found
        bodies.append(step.body.strip())
        marks.append("copied")
    for missing in range(position, len(values)):
        insert(missing)
    return (bodies, marks) if "inserted" in marks else None


def exact_critique(question: str, attempt: str) -> str:
    """The critique text of an attempt, in the format that every critic writes. Raises ValueError on no chain."""
    chain = parse_question(question)
    trace = parse_trace(attempt)
    values = chain.results()
    answer = str(values[-1])
    copied, wording = _right_steps(chain, trace, values)
    rest = step_bodies(chain, values, wording)[len(copied) :]
    copies = ["copied"] * len(copied)
    all_copied = len(copied) == len(trace.complete_steps)

    if not all_copied or (trace.answer is not None and rest):
        if trace.answer is not None and trace.answer.body == answer and _numbered(trace):
            inserted = _missing_step_critique(chain, trace, values)
            if inserted is not None:
                return _marked(*inserted, answer, "unjustified")
        # With all steps copied, the attempt answers too early and wrongly: its answer is the error.
        first = "inserted" if all_copied else "corrected"
        return _marked(copied + rest, copies + [first] + ["continued"] * len(rest), answer, "incorrect")
    if trace.answer is not None:
        verdict = "correct" if trace.answer.body == answer else "incorrect"
        return _marked(copied, copies, answer, verdict)
    verdict = "incomplete"
    first = "continued"
    unfinished = trace.unfinished
    if unfinished is not None:
        continued = _continuing(unfinished, chain, len(copied), values, wording)
        if continued is None or unfinished.number != len(copied) + 1:
            verdict, first = "incorrect", "corrected"
        else:
            rest = step_bodies(chain, values, continued)[len(copied) :]
    return _marked(copied + rest, copies + [first] + ["continued"] * len(rest), answer, verdict)


def _numbered(trace: Trace) -> bool:
    return all(step.closed and step.number == i for i, step in enumerate(trace.steps, start=1))


def _right_steps(chain: Chain, trace: Trace, values: list[int]) -> tuple[list[str], Wording]:
    """Bodies of the complete steps before the first wrong one, and the wording of the last of them."""
    copied: list[str] = []
    wording: Wording = "own"
    for position, step in enumerate(trace.complete_steps):
        found = _wording_of(step.body, chain, position, values)
        if found is None or not step.closed or step.number != position + 1:
            break
        wording = found
        copied.append(step.body.strip())
    return copied, wording
