"""Aligned decoding with a server that keeps tokenizer and logits to itself: in turns, a request for each.

For each step the server is asked for one word, with the probabilities of the tokens that might have come in its place;
at last, if anything is still to be written, for that, with its grammar where the server takes one. No step's word
depends on another's: each is asked for as if those before it were right. So they are asked for at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from stepalign.critique.trace import contains_tag
from stepalign.prompts import Message
from stepalign.types import FinishReason, Forced
from stepalign_critic.backends.base import Alignment
from stepalign_critic.backends.openai_answers import Answer, read_completion, read_json
from stepalign_critic.backends.together import together
from stepalign_critic.decoding.bounds import cut_by_characters, without_begun_end
from stepalign_critic.decoding.grammar import CHARACTERS_A_TOKEN, Literal, Sequenced, to_gbnf
from stepalign_critic.decoding.plan import Piece, Plan, Remainder, Score
from stepalign_run.config.critic import OpenAISection

Ask = Callable[[list[Message], int | None, dict[str, Any]], Awaitable[Answer]]
"""Messages, a budget in tokens if it is not the usual, and further fields → an answer that holds a completion."""

_WORD_TOKENS = 2
_TOP_LOGPROBS = 20
_UNDECIDED = Score(0.0, (-math.inf,))
"""Of a step about which the model says neither word: nothing is known to be wrong there, whatever the threshold."""
_LEAST = -30.0
"""The log-probability of a word that is not among the likeliest tokens that the server tells."""


class OpenAITurns:
    """Asks for critiques through ``ask``, with the fields that ``settings`` name, for ``at_once`` words at a time."""

    def __init__(self, settings: OpenAISection, ask: Ask, at_once: int) -> None:
        self._settings = settings
        self._ask = ask
        self._at_once = at_once

    def fields(self, grammar: str | None) -> dict[str, Any]:
        """The fields that some request of a critique has: those for probabilities and, with one, for a grammar."""
        logprobs = {"logprobs": True, "top_logprobs": _TOP_LOGPROBS} if self._settings.logprobs else {}
        match self._settings.grammar:
            case "grammar" if grammar is not None:
                return {**logprobs, "grammar": grammar}
            case "structured_outputs" if grammar is not None:
                return {**logprobs, "structured_outputs": {"grammar": grammar}}
            case _:
                return logprobs

    async def align(self, plan: Plan) -> Alignment:
        """A critique by ``plan``. Raises ServiceError when a request gets no answer."""
        conversation = plan.conversation
        assert conversation is not None, "this backend aligns in turns"
        tokens = _Tokens()
        asking = [
            partial(self._mark, conversation.asking(i), piece, tokens)
            for i, piece in reversed([*enumerate(plan.pieces)])
        ]
        # The longest alone: it begins with all the others, which then find every token in the server's prefix cache.
        # Together they would each be read anew. A server with one cache reads none anew either, since they get shorter.
        latest = [await call() for call in asking[:1]]
        marks = [*reversed(await together(asking[1:], self._at_once)), *latest]
        choosing = plan.choose([score or _UNDECIDED for score, _ in marks])
        remainder = plan.remainder(choosing.place, _estimated_tokens)
        text, truncated = "", False
        if remainder.grammar is not None:
            text, truncated = await self._write(remainder, tokens)
        # Without a grammar nothing has a bound but the whole.
        bounded = None if self._settings.grammar == "none" else remainder.grammar
        cut = frozenset[Forced]() if bounded is None else cut_by_characters(bounded, text, remainder.open_text)
        if truncated and bounded is not None and plan.known is not None:
            # Its tokens were shorter than a grammar without tokens can foresee. The known answer needs no writing.
            text, truncated, cut = without_begun_end(text), False, cut | {Forced.STEP_BOUND}
        finished = plan.finish(choosing, text, cut)
        p_wrong = choosing.p_wrong if all(told for _, told in marks) else None
        return Alignment(finished.text, p_wrong, finished.forced, tokens.read, tokens.written, truncated)

    async def _mark(self, messages: list[Message], piece: Piece, tokens: _Tokens) -> tuple[Score | None, bool]:
        """The score of a step, None when the answer is none of the words; and whether probabilities tell it."""
        answer = await self._ask(messages, _WORD_TOKENS, self.fields(None))
        text = tokens.count(answer)
        (other,) = piece.others
        found = likeliest_tokens(read_json(answer.content.decode("utf-8-sig", "replace")))
        score = None if found is None else score_of(found, piece.text, other)
        return (said(text, piece.text, other), False) if score is None else (score, True)

    async def _write(self, remainder: Remainder, tokens: _Tokens) -> tuple[str, bool]:
        """What takes the attempt's place, from its opening tag on, and whether a budget cut it before its answer."""
        assert remainder.messages is not None and remainder.grammar is not None
        grammar = None
        if self._settings.grammar != "none":
            grammar = to_gbnf(Sequenced((*map(Literal, remainder.given), remainder.grammar)))
        fields = {name: value for name, value in self.fields(grammar).items() if "logprobs" not in name}
        answer = await self._ask(remainder.messages, None, fields)
        text = tagged_text(tokens.count(answer), remainder.open_text)
        cut = read_completion(answer).finish_reason is FinishReason.LENGTH and "</answer>" not in text
        return text, cut


class _Tokens:
    """Those read and written in the requests of one critique."""

    def __init__(self) -> None:
        self.read = self.written = 0

    def count(self, answer: Answer) -> str:
        """Count those of an answer, and give its text."""
        made = read_completion(answer)
        self.read += made.prompt_tokens
        self.written += made.completion_tokens
        return made.text


def _estimated_tokens(text: str) -> int:
    """A server keeps its tokenizer to itself: most tokens are longer than this."""
    return -(-len(text) // CHARACTERS_A_TOKEN)


def likeliest_tokens(completion: Any) -> list[tuple[str, float]] | None:
    """The tokens that could have come first and their natural-log probabilities; None where the server tells none."""
    try:
        first = completion["choices"][0]["logprobs"]["content"][0]
        listed = [*first.get("top_logprobs", []), first]
        found = [(str(each["token"]), float(each["logprob"])) for each in listed]
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    known = {token: logprob for token, logprob in found if not math.isnan(logprob)}
    return list(known.items()) or None


def score_of(tokens: list[tuple[str, float]], own: str, other: str) -> Score | None:
    """The score of ``own`` against ``other``; None when no token begins either word."""
    totals = [_total(tokens, word) for word in (own, other)]
    if max(totals) == -math.inf:
        return None
    own_total, other_total = (max(total, _LEAST) for total in totals)
    return Score(own_total, (other_total,))


def said(text: str, own: str, other: str) -> Score | None:
    """The score of an answer of which no probabilities are known; None when it is neither word."""
    words = text.split()
    first = words[0].strip(".,;:!\"'*").lower() if words else ""
    if first not in (own.lower(), other.lower()):
        return None
    return Score(0.0, (_LEAST,)) if first == own.lower() else Score(_LEAST, (0.0,))


def _total(tokens: list[tuple[str, float]], word: str) -> float:
    """The log-probability of all tokens that begin ``word``, case and a space before it aside."""
    begins = [p for token, p in tokens if (bare := token.strip().lower()) and word.lower().startswith(bare)]
    return math.log(sum(map(math.exp, begins))) if begins and max(begins) > -700 else -math.inf


def tagged_text(text: str, opening: str) -> str:
    """What a model wrote instead of an attempt's step and what follows, as tagged text from ``opening`` on.

    Servers without grammars may leave the first tag out, or all of them.
    """
    bare = text.rpartition("</think>")[2].strip()
    tag, _, body = opening.partition(">")
    tag += ">"
    if not opening:
        return bare
    if tag in bare:
        return bare[bare.index(tag) :]
    written = bare if not body or bare.startswith(body.strip()) else f"{body} {bare}"
    return tag + written + ("" if contains_tag(bare) else tag.replace("<", "</", 1))
