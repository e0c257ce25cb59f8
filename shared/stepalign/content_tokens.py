"""Text of models and strangers → token ids, none of which is a token that a tokenizer adds to its vocabulary.

Added tokens are what steers a model: ends of turns, roles, and with many models tokens that are not marked as special,
such as ``<think>`` and ``<tool_call>``. ``split_special_tokens`` of transformers takes only the marked ones apart; here
every added token is, but for those of whitespace or of one character (such as Gemma's runs of line breaks), which are
ordinary text.
"""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakKeyDictionary

from stepalign.errors import PromptError


class ContentTokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    @property
    def added_tokens_decoder(self) -> dict[int, Any]: ...

    def __call__(self, text: str, **kwargs: Any) -> Any: ...

    def __len__(self) -> int: ...


def content_token_ids(tokenizer: ContentTokenizer, text: str) -> list[int]:
    """The ids of ``text`` without BOS and EOS. An added token that it spells becomes the pieces of its letters.

    Raises PromptError when it spells one and the tokenizer is not a fast one, which cannot say where; and for a
    character that the tokenizer has nothing but a control token for.
    """
    controls = control_ids(tokenizer)
    options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True}
    token_ids: list[int] = tokenizer(text, **options)["input_ids"]
    if controls.isdisjoint(token_ids):
        return token_ids
    try:
        encoded = tokenizer(text, return_offsets_mapping=True, **options)
    except NotImplementedError:
        raise PromptError(
            f"a text spells a control token, which {type(tokenizer).__name__} cannot take apart; put a tokenizer.json "
            "beside the model, so that its tokenizer is a fast one"
        ) from None
    parted: list[int] = []
    for token_id, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if token_id not in controls:
            parted.append(token_id)
        elif end - start == 1:
            raise PromptError(f"the tokenizer reads {text[start:end]!r} as the control token {token_id}")
        else:
            middle = (start + end) // 2
            parted += content_token_ids(tokenizer, text[start:middle]) + content_token_ids(tokenizer, text[middle:end])
    return parted


_control_ids: WeakKeyDictionary[ContentTokenizer, tuple[int, frozenset[int]]] = WeakKeyDictionary()


def control_ids(tokenizer: ContentTokenizer) -> frozenset[int]:
    """The ids that no content may give: added tokens of two visible characters at least.

    But for the one that stands for unknown words, unless it stands for something else as well.
    """
    size, known = _control_ids.get(tokenizer, (-1, frozenset[int]()))
    if size != len(tokenizer):
        unknown = getattr(tokenizer, "unk_token_id", None)
        if unknown in {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}:
            unknown = None
        added = tokenizer.added_tokens_decoder.items()
        known = frozenset(i for i, token in added if i != unknown and len(str(token).strip()) > 1)
        _control_ids[tokenizer] = len(tokenizer), known
    return known
