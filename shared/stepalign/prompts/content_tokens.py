"""Text of models and strangers → token ids, none of which is a token that a tokenizer adds to its vocabulary.

Added tokens steer a model: ends of turns, roles, and with many models tokens that are not marked as special,
such as ``<think>`` and ``<tool_call>``. ``split_special_tokens`` of transformers takes only the marked ones apart. Here
contents are encoded by a copy of the tokenizer that has no such token at all: text that spells one becomes the pieces
of its letters. Runs of whitespace and single characters that are added without being special (Gemma's, GPT-NeoX's) are
ordinary text and stay.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol, cast
from uuid import uuid4
from weakref import WeakKeyDictionary

from stepalign.errors import ContentError, PromptError

# SentencePiece writes spaces so.
_SPACE = "\u2581"


class ContentTokenizer(Protocol):
    """The part of a transformers tokenizer that encoding uses."""

    @property
    def backend_tokenizer(self) -> Any: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class _Encoder:
    """``backend`` is the copy; ``size`` counts the tokenizer's tokens, ``controls`` are those that the copy lacks."""

    backend: Any
    size: int
    controls: frozenset[int]


_encoders: WeakKeyDictionary[ContentTokenizer, _Encoder] = WeakKeyDictionary()


def content_token_ids(tokenizer: ContentTokenizer, text: str) -> list[int]:
    """The ids of ``text`` without BOS and EOS.

    The first call for a tokenizer copies it, which takes a second with a large vocabulary. Raises PromptError for one
    that is not a fast one, and ContentError for a text with a part that only a control token stands for: an unknown
    word, or a character that is such a token.
    """
    encoder = _encoder(tokenizer)
    encoding = encoder.backend.encode(text, add_special_tokens=False)
    token_ids: list[int] = encoding.ids
    if not encoder.controls.isdisjoint(token_ids):
        token_id, (start, end) = next(
            found for found in zip(token_ids, encoding.offsets, strict=True) if found[0] in encoder.controls
        )
        raise ContentError(
            f"the tokenizer reads {text[start:end]!r} as the control token {token_id}: it has no other token for it, "
            "nor one for unknown words alone"
        )
    return token_ids


def control_ids(tokenizer: ContentTokenizer) -> frozenset[int]:
    """The ids that no content gives. Raises PromptError for a tokenizer that is not a fast one."""
    return _encoder(tokenizer).controls


def _encoder(tokenizer: ContentTokenizer) -> _Encoder:
    known = _encoders.get(tokenizer)
    if known is None or known.size != len(tokenizer):
        known = _encoders[tokenizer] = _without_controls(tokenizer)
    return known


def _without_controls(tokenizer: ContentTokenizer) -> _Encoder:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise PromptError(
            f"{type(tokenizer).__name__} is no fast tokenizer, and only of such a one it is known that a text gives no "
            "control token; put a tokenizer.json beside the model"
        )
    written: dict[str, Any] = json.loads(backend.to_str())
    unknown = _unknown_word(tokenizer)
    steering = {token["content"]: token["id"] for token in written["added_tokens"] if not _is_ordinary(token)}
    controls = {word: token_id for word, token_id in steering.items() if word != unknown}
    # Nobody can spell these names. The tokens stay, so that all others keep their ids.
    nobody = uuid4().hex
    words = _words(written["model"])
    written["added_tokens"] = [
        {**token, "content": f"{nobody} {token['content']}"} if token["content"] in steering else token
        for token in written["added_tokens"]
        # Of a word of the vocabulary nothing is left to be added.
        if not (token["content"] in steering and token["content"] in words)
    ]
    _rename_words(written["model"], {word: f"{nobody} {word}" for word in controls if len(word) > 1})
    copy: Any = backend.from_str(json.dumps(written))
    copy.no_padding()
    copy.no_truncation()
    return _Encoder(copy, len(tokenizer), frozenset(controls.values()))


def _is_ordinary(token: dict[str, Any]) -> bool:
    return not token["special"] and len(token["content"].replace(_SPACE, " ").strip()) < 2


def _unknown_word(tokenizer: ContentTokenizer) -> str | None:
    """The token of unknown words; None when it has another use too."""
    unknown = getattr(tokenizer, "unk_token", None)
    others = {getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos", "pad")}
    return None if unknown in others else unknown


def _words(model: dict[str, Any]) -> set[str]:
    vocabulary = cast(dict[str, int] | list[tuple[str, float]], model["vocab"])
    return set(vocabulary) if isinstance(vocabulary, dict) else {word for word, _ in vocabulary}


def _rename_words(model: dict[str, Any], names: dict[str, str]) -> None:
    """Rename control tokens that are words of the vocabulary too, and drop the merges that make them."""
    kept = {model.get("unk_token")}
    vocabulary = cast(dict[str, int] | list[tuple[str, float]], model["vocab"])

    def name(word: str) -> str:
        return word if word in kept else names.get(word, word)

    if isinstance(vocabulary, dict):
        model["vocab"] = {name(word): number for word, number in vocabulary.items()}
    else:
        model["vocab"] = [[name(word), score] for word, score in vocabulary]
    if model.get("merges"):
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
