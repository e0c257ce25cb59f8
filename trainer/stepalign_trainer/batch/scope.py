"""Distillation scope and token groups: from spans in a rollout's text to masks over its token ids.

Not in the paper. After the first wrong step the student's own prefix contradicts the corrected critique, and the
teacher's distribution there mixes two stories; a validated alignment says where that begins.

``through_first_error`` keeps the loss on the tokens up to the end of the first segment that the critique does not copy:
an incorrect attempt's wrong step with its closing tag, or its wrong answer; an unjustified one's step after the
insertion. Correct and incomplete attempts keep all tokens, except that text after the answer stands where EOS should:
its first token is kept, the rest is not. ``random_step`` is its control: where ``through_first_error`` cuts after the
first such segment of an incorrect or unjustified attempt, it cuts after one that is chosen by chance (by the rollout's
id). ``full`` keeps every token, as in the paper. EOS is a token like any other.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers.decoders import DecodeStream

from stepalign.critique.forms import first_uncopied
from stepalign.critique.trace import Span, parse_trace
from stepalign.types import Critique, FinishReason, Verdict
from stepalign_run.config.arm import Scope
from stepalign_run.rollout import Rollout


def token_spans(rollout: Rollout, tokenizer: Any) -> list[Span]:
    """The span of each completion token in ``rollout.text``; EOS has an empty span at the end.

    Token ids are the truth: they are decoded one after the other, never the text re-tokenized. Tokens that share a
    character (a character of several byte tokens) share its span. Raises ValueError when ids and text disagree.
    """
    ids = rollout.completion_token_ids
    content = ids[:-1] if rollout.finish_reason is FinishReason.STOP else ids
    stream = DecodeStream(skip_special_tokens=False)
    spans: list[Span] = []
    position = 0
    waiting = 0
    decoded = ""
    for token in content:
        piece = stream.step(tokenizer.backend_tokenizer, token)
        waiting += 1
        if piece is None:
            continue
        spans.extend([(position, position + len(piece))] * waiting)
        position += len(piece)
        decoded += piece
        waiting = 0
    if not rollout.text.startswith(decoded) or (not waiting and decoded != rollout.text):
        raise ValueError(f"rollout {rollout.rollout_id}: its text is not the decoding of its token ids")
    spans.extend([(position, len(rollout.text))] * waiting)
    if content is not ids:
        spans.append((len(rollout.text), len(rollout.text)))
    return spans


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


def _scope_end(critique: Critique, rollout: Rollout, spans: Sequence[Span]) -> int:
    difference = critique.alignment.first_difference
    if critique.verdict in (Verdict.INCORRECT, Verdict.UNJUSTIFIED) and difference is not None:
        return _count_before(spans, difference[1])
    missing_eos = _missing_eos(rollout, spans) if critique.verdict is Verdict.CORRECT else None
    return len(spans) if missing_eos is None else missing_eos + 1


def _random_scope_end(critique: Critique, rollout: Rollout, spans: Sequence[Span]) -> int:
    if critique.alignment.first_difference is None or critique.verdict not in (Verdict.INCORRECT, Verdict.UNJUSTIFIED):
        return _scope_end(critique, rollout, spans)
    trace = parse_trace(rollout.text)
    segments = [step.span for step in trace.steps] + ([trace.answer.span] if trace.answer is not None else [])
    _, end = random.Random(f"scope {rollout.rollout_id}").choice(segments)
    return _count_before(spans, end)


def _missing_eos(rollout: Rollout, spans: Sequence[Span]) -> int | None:
    """The token that stands where EOS should: the first one of a text after the answer."""
    trace = parse_trace(rollout.text)
    if trace.answer is None or not rollout.text[trace.answer.span[1] :].strip():
        return None
    return min(_count_before(spans, trace.answer.span[1]), len(spans) - 1)


def first_error_token(critique: Critique, rollout: Rollout, spans: Sequence[Span]) -> int | None:
    """Index of the first token that differs from the critique's, inside the first segment that is not copied."""
    difference = critique.alignment.first_difference
    if critique.verdict is Verdict.CORRECT:
        return _missing_eos(rollout, spans)
    if critique.verdict is Verdict.INCOMPLETE:
        # Stopped before the answer: EOS is the error. Cut off by the budget: there is none.
        return len(spans) - 1 if rollout.finish_reason is FinishReason.STOP else None
    assert difference is not None
    theirs = rollout.text[difference[0] : difference[1]]
    ours = _counterpart(critique)
    pairs = enumerate(zip(theirs, ours, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
    character = difference[0] + min(shared, len(theirs) - 1)
    return next(i for i, (_, end) in enumerate(spans) if end > character)


def _counterpart(critique: Critique) -> str:
    """The critique's text where the attempt's first uncopied segment stands."""
    place = first_uncopied(critique)
    trace = parse_trace(critique.text)
    segments = [step.span for step in trace.steps] + ([trace.answer.span] if trace.answer is not None else [])
    return next((critique.text[start:end] for start, end in segments if start == place), "")


def token_groups(scope: Scope, rollout: Rollout, critique: Critique | None, spans: Sequence[Span]) -> TokenGroups:
    """Scope and error position of one rollout; without a critique every token is in scope and no error is known."""
    if critique is None:
        return TokenGroups(in_scope=len(spans), first_error=None, aligned=False)
    in_scope = {
        "full": lambda: len(spans),
        "through_first_error": lambda: _scope_end(critique, rollout, spans),
        "random_step": lambda: _random_scope_end(critique, rollout, spans),
    }[scope]()
    return TokenGroups(in_scope, first_error_token(critique, rollout, spans), aligned=True)
