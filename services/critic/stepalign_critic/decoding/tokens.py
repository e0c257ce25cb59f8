"""Grammars over a tokenizer's tokens, by llguidance."""

from __future__ import annotations

from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, apply_token_bitmask_inplace, fill_next_token_bitmask

from stepalign.errors import ConfigError
from stepalign.prompts.content_tokens import content_token_ids, control_ids
from stepalign_critic.decoding.grammar import Grammar, to_lark


class _SpacedWords:
    """A tokenizer whose decoding puts a space before each word, in the form that llguidance takes.

    Of such tokenizers (those without a decoder) llguidance cannot tell the bytes of a token by itself.
    """

    def __init__(self, tokenizer: Any, eos: int, size: int) -> None:
        controls = control_ids(tokenizer)
        words = [tokenizer.convert_ids_to_tokens(i) or "" for i in range(size)]
        self.tokens = [b"\xff" if i in controls else f" {word}".encode() for i, word in enumerate(words)]
        self.eos_token_id = eos
        self.bos_token_id = None
        self.unk_token_id = None
        self.special_token_ids = sorted(controls)

        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return content_token_ids(self._tokenizer, text)


class GrammarTokens:
    """Matchers of grammars over ``tokenizer``. Raises ConfigError for a tokenizer whose tokens have no known bytes."""

    def __init__(self, tokenizer: Any, eos: tuple[int, ...], size: int) -> None:
        self._tokens = _wrapped(tokenizer, eos, size)
        # Of words with a space before each, bytes that are certain may be half a word.
        self._forces = tokenizer.backend_tokenizer.decoder is not None
        self._bitmask = allocate_token_bitmask(1, self._tokens.vocab_size)

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """A matcher at the grammar's beginning."""
        matcher = LLMatcher(self._tokens, LLMatcher.grammar_from_lark(to_lark(grammar)))
        if matcher.is_error():
            raise RuntimeError(f"the grammar of a critique is refused: {matcher.get_error()}")
        return matcher

    def best(self, matcher: LLMatcher, logits: torch.Tensor) -> int:
        """The likeliest token that the grammar allows, of ``logits [V]``, and take it."""
        likeliest = int(logits.argmax())
        if matcher.try_consume_tokens([likeliest]):
            return likeliest
        if not self._forces:
            # A mask too is wrong about half words; there are few words, and taking one is not.
            ordered = logits.argsort(descending=True).tolist()
            found = next((token for token in ordered if matcher.try_consume_tokens([token])), None)
            if found is None:
                raise RuntimeError("the grammar of a critique takes no token of the critic's vocabulary")
            return found
        fill_next_token_bitmask(matcher, self._bitmask, 0)
        masked = logits.detach().float().cpu().unsqueeze(0).numpy().copy()
        apply_token_bitmask_inplace(masked, self._bitmask)
        likeliest = int(masked[0].argmax())
        if not matcher.consume_token(likeliest):
            raise RuntimeError(f"the grammar of a critique takes no token: {matcher.get_error()}")
        return likeliest

    def forced(self, matcher: LLMatcher) -> list[int]:
        """The tokens that the grammar leaves no choice of, and take them."""
        forced: list[int] = matcher.compute_ff_tokens() if self._forces else []
        if forced and not matcher.consume_tokens(forced):
            raise RuntimeError(f"the grammar of a critique refuses what it forces: {matcher.get_error()}")
        return forced


def _wrapped(tokenizer: Any, eos: tuple[int, ...], size: int) -> LLTokenizer:
    if tokenizer.backend_tokenizer.decoder is None:
        return LLTokenizer(_spaced(tokenizer, eos[0], size), n_vocab=size)
    try:
        return from_tokenizer(tokenizer, n_vocab=size, eos_token=list(eos))
    except ValueError as error:
        raise ConfigError(f"aligned decoding cannot read the critic's tokenizer: {error}") from error


def _spaced(tokenizer: Any, eos: int, size: int) -> Any:
    from llguidance import TokenizerWrapper

    return TokenizerWrapper(_SpacedWords(tokenizer, eos, size))
