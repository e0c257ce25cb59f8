"""Thoughts of critics that think: a critique begins after ``</think>``.

Whether a prompt makes the model think is seen in its tokens: the chat template opened the thought, or closed it, or
the model's first token opens it. Contents cannot: they give no such token. A thought that outlasts its budget is
closed, so that a critique follows in any case.
"""

from __future__ import annotations

from typing import Any

_START, _END = "<think>", "</think>"
_GENERATION_PROMPT_TOKENS = 16
"""More than any template puts between the last content and the answer."""


class Thinking:
    """The tokens of thoughts, of a tokenizer that has ``<think>`` and ``</think>``."""

    def __init__(self, tokenizer: Any, eos: tuple[int, ...]) -> None:
        self.start, self.end = (tokenizer.convert_tokens_to_ids(tag) for tag in (_START, _END))
        self._after: list[int] = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
        self._eos = eos

    @classmethod
    def of(cls, tokenizer: Any, eos: tuple[int, ...]) -> Thinking | None:
        """None for a tokenizer without these tokens."""
        known = tokenizer.get_vocab()
        return cls(tokenizer, eos) if _START in known and _END in known else None

    def is_open(self, prompt: list[int]) -> bool | None:
        """Whether the prompt ends inside a thought; None when the model may open one."""
        # What the template wrote into earlier turns lies further back.
        tail = prompt[-_GENERATION_PROMPT_TOKENS:]
        latest = next((token for token in reversed(tail) if token in (self.start, self.end)), None)
        return None if latest is None else latest == self.start

    def thought(self, opened: bool, completion: list[int]) -> list[int]:
        """The tokens of ``completion`` before the critique; none when it does not begin as a thought."""
        if not opened and completion[:1] != [self.start]:
            return []
        if self.end in completion:
            return completion[: completion.index(self.end) + 1] + self._after
        return [token for token in completion if token not in self._eos] + [self.end, *self._after]
