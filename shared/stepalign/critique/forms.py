"""The two ways of writing a critique that fail in the paper, made from a validated critique.

Each changes one thing of it, so a comparison with the critique itself measures that thing alone.
"""

from __future__ import annotations

from stepalign.critique.trace import parse_trace
from stepalign.types import Critique, Verdict


def first_uncopied(critique: Critique) -> int:
    """Where in ``critique.text`` its first segment stands that copies nothing, in code points; the answer if all do."""
    trace = parse_trace(critique.text)
    before = critique.alignment.copied_steps if critique.first_error_step is None else critique.first_error_step - 1
    if before < len(trace.steps):
        return trace.steps[before].span[0]
    return trace.answer.span[0] if trace.answer is not None else len(critique.text)


def quote_wrong_step(critique: Critique, attempt: str) -> str:
    """Full repetition: the attempt's first wrong segment, verbatim, before its replacement.

    Critiques that call nothing wrong stay as they are.
    """
    difference = critique.alignment.first_difference
    if critique.verdict is not Verdict.INCORRECT or difference is None:
        return critique.text
    place = first_uncopied(critique)
    quoted = attempt[slice(*difference)] + _separator(critique.text)
    return critique.text[:place] + quoted + critique.text[place:]


def _separator(text: str) -> str:
    """The text between the first two segments; a space where there are no two."""
    trace = parse_trace(text)
    spans = [step.span for step in trace.steps] + ([trace.answer.span] if trace.answer is not None else [])
    return text[spans[0][1] : spans[1][0]] if len(spans) > 1 else " "


def omit_copied_steps(critique: Critique) -> str:
    """Omission: the critique from its first segment on that copies nothing."""
    return critique.text[first_uncopied(critique) :]
