"""Distillation scope and token groups: from spans in a rollout's text to masks over its token ids.

Not in the paper. After the first wrong step the student's own prefix contradicts the corrected critique, and the
teacher's distribution there mixes two stories; a validated alignment says where that begins.

``through_first_error`` keeps the loss on the tokens up to the end of the first segment that the critique does not copy:
an incorrect attempt's wrong step with its closing tag, or its wrong answer; an unjustified one's step after the
insertion. Correct and incomplete attempts keep all tokens, except that text after a tagged answer stands where EOS
should: its first token is kept, the rest is not. ``random_step`` is its control: where ``through_first_error`` cuts
after the first such segment of an incorrect or unjustified attempt, it cuts after one that is chosen by chance (by the
rollout's id). ``full`` keeps every token, as in the paper. EOS is a token like any other.

Segments are those of the attempt as the critic read it: an attempt without tags is split by the rules of
:mod:`stepalign.critique.splitting`, and its segments have no tags in the text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from stepalign.critique.forms import first_uncopied
from stepalign.critique.splitting import Segment, SplitAttempt, split_attempt
from stepalign.critique.trace import Span, parse_trace
from stepalign.errors import UnusableReason, UnusableRolloutError
from stepalign.types import Critique, FinishReason, Verdict
from stepalign_run.config.arm import Scope
from stepalign_run.rollout import Rollout


@dataclass(frozen=True)
class TokenGroups:
    """Where the critique departs from the rollout, in token indices.

    ``in_scope`` tokens, from the first, carry the loss. ``first_error`` is None without an error, and where no critique
    tells (``aligned`` false): then no token is known to be correct.
    """

    in_scope: int
    first_error: int | None
    aligned: bool = True


def _count_before(spans: Sequence[Span], end: int) -> int:
    return sum(start < end for start, _ in spans)


def _first_difference(critique: Critique, rollout: Rollout) -> tuple[SplitAttempt, Segment] | None:
    """The split attempt and its first segment that the critique does not copy; None where it calls nothing wrong.

    Raises UnusableRolloutError for a critique of another text.
    """
    if critique.verdict not in (Verdict.INCORRECT, Verdict.UNJUSTIFIED):
        return None
    split = split_attempt(rollout.text)
    difference = critique.alignment.first_difference
    segment = next((segment for segment in split.segments if segment.sent == difference), None)
    if segment is None:
        raise UnusableRolloutError(
            UnusableReason.CRITIQUE_IS_OF_ANOTHER_TEXT,
            f"rollout {rollout.rollout_id}: the critique's first difference, {difference}, is the span of no step and "
            "no answer; critic and trainer must be of one version",
        )
    return split, segment


def _scope_end(critique: Critique, rollout: Rollout, spans: Sequence[Span]) -> int:
    found = _first_difference(critique, rollout)
    if found is not None:
        return _count_before(spans, found[1].sent[1])
    missing_eos = _missing_eos(rollout, spans) if critique.verdict is Verdict.CORRECT else None
    return len(spans) if missing_eos is None else missing_eos + 1


def _random_scope_end(critique: Critique, rollout: Rollout, spans: Sequence[Span]) -> int:
    found = _first_difference(critique, rollout)
    if found is None:
        return _scope_end(critique, rollout, spans)
    chosen = random.Random(f"scope {rollout.rollout_id}").choice(found[0].segments)
    return _count_before(spans, chosen.sent[1])


def _missing_eos(rollout: Rollout, spans: Sequence[Span]) -> int | None:
    """The token that stands where EOS should: the first one of a text after the tagged answer.

    Only the tags end an attempt. In a text without them more words may follow the answer.
    """
    trace = parse_trace(rollout.text)
    if trace.answer is None or not rollout.text[trace.answer.span[1] :].strip():
        return None
    return min(_count_before(spans, trace.answer.span[1]), len(spans) - 1)


def first_error_token(critique: Critique, rollout: Rollout, spans: Sequence[Span]) -> int | None:
    """Index of the first token that differs from the critique's, inside the first segment that is not copied.

    Both are compared with their tags, whitespace aside, as the validator compares steps. Raises UnusableRolloutError
    for a critique of another text.
    """
    if critique.verdict is Verdict.CORRECT:
        return _missing_eos(rollout, spans)
    found = _first_difference(critique, rollout)
    if found is None:
        # Stopped before the answer: EOS is the error. Cut off by the budget: there is none.
        return len(spans) - 1 if rollout.finish_reason is FinishReason.STOP else None
    split, segment = found
    shared = _shared_length(split.tagged[slice(*segment.tagged)], _counterpart(critique))
    character = split.place_in_text(segment, segment.tagged[0] + shared)
    return next(i for i, (_, end) in enumerate(spans) if end > character)


def _shared_length(theirs: str, ours: str) -> int:
    """Where ``theirs`` first differs from ``ours``, whitespace aside; its length when it is how ``ours`` begins."""
    letters = iter([letter for letter in ours if not letter.isspace()])
    written = ((i, letter) for i, letter in enumerate(theirs) if not letter.isspace())
    return next((i for i, letter in written if letter != next(letters, None)), len(theirs))


def _counterpart(critique: Critique) -> str:
    """The critique's text where the attempt's first uncopied segment stands."""
    place = first_uncopied(critique)
    trace = parse_trace(critique.text)
    segments = [step.span for step in trace.steps] + ([trace.answer.span] if trace.answer is not None else [])
    return next((critique.text[start:end] for start, end in segments if start == place), "")


def token_groups(scope: Scope, rollout: Rollout, critique: Critique | None, spans: Sequence[Span]) -> TokenGroups:
    """Scope and error position of one rollout; without a critique every token is in scope and no error is known.

    Raises UnusableRolloutError for a critique of another text.
    """
    if critique is None:
        return TokenGroups(in_scope=len(spans), first_error=None, aligned=False)
    in_scope = {
        "full": lambda: len(spans),
        "through_first_error": lambda: _scope_end(critique, rollout, spans),
        "random_step": lambda: _random_scope_end(critique, rollout, spans),
    }[scope]()
    return TokenGroups(in_scope, first_error_token(critique, rollout, spans), aligned=True)
