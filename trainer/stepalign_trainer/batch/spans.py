"""Where each completion token stands in a rollout's text.

Token ids are the truth: they are decoded, and the text is never tokenized again. No sequence of ids is without spans,
though decoders differ in what they make of bytes that are no character: byte-level ones write U+FFFD for a part of such
bytes, those with byte fallback (Llama 2, Gemma) one for each byte of the whole run, right ones before it included. So a
token's text may change with the tokens that follow. A boundary between two tokens is kept where the ids up to it decode
to what the text begins with; tokens without a boundary between them share a span.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stepalign.critique.trace import Span
from stepalign.errors import UnusableReason, UnusableRolloutError
from stepalign.types import FinishReason
from stepalign_run.rollout import Rollout

Decode = Callable[[Sequence[int]], str]

# Bytes that are no character, and ids that stand for no token: the text holds this or nothing.
_REPLACEMENT = "\ufffd"
# Tokens that are decoded at once. In a run of broken bytes that is longer, not every boundary is looked for.
_WINDOW = 256


def token_spans(rollout: Rollout, tokenizer: Any) -> list[Span]:
    """The span of each completion token in ``rollout.text``, one for each, in order, together the whole text.

    EOS has an empty span at the end. Tokens that share a character (a character of several byte tokens) share its span.
    Raises UnusableRolloutError when the text is not the decoding of the ids.
    """
    ids = rollout.completion_token_ids
    content = ids[:-1] if rollout.finish_reason is FinishReason.STOP else ids

    def decode(part: Sequence[int]) -> str:
        return tokenizer.backend_tokenizer.decode(part, skip_special_tokens=False)

    if decode(content) != rollout.text:
        raise UnusableRolloutError(
            UnusableReason.TEXT_IS_NOT_ITS_TOKENS,
            f"rollout {rollout.rollout_id}: its text is not the decoding of its token ids; solver and trainer must "
            "have the same tokenizer",
        )
    spans = _aligned(content, rollout.text, decode)
    end = len(rollout.text)
    return spans if content is ids else [*spans, (end, end)]


def _aligned(ids: Sequence[int], text: str, decode: Decode) -> list[Span]:
    """Spans of ``ids``, whose decoding is ``text``.

    Decoded is a window that begins where the text depends on nothing before: at tokens whose text is whole characters.
    They stay in it since some decoders treat the first token of all in another way.
    """
    spans: list[Span] = []
    start, shown, position = 0, "", 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and (end - start) % max(1, (end - start) // _WINDOW):
            continue
        decoded = decode(ids[start:end])
        piece = decoded[len(shown) :]
        whole = piece == text[position:] if end == len(ids) else text.startswith(piece, position)
        if not whole or not decoded.startswith(shown):
            continue
        waiting = end - len(spans)
        # Nothing new after a broken character is another byte of it.
        same = not piece and spans and shown.endswith(_REPLACEMENT)
        spans.extend([spans[-1] if same else (position, position + len(piece))] * waiting)
        position += len(piece)
        settled = piece and _REPLACEMENT not in piece
        start = end - waiting if settled else start
        shown = decode(ids[start:end]) if settled else decoded
    return [*spans, *[(position, len(text))] * (len(ids) - len(spans))]
