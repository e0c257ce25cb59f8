"""Prompts: versioned text files, filled in one pass and rendered to token ids.

A *prompt set* is a folder beside this file (``chat-v1``, ``lab-v1``) with one text file per prompt. A file holds
messages, each opened by a line ``[system]``, ``[user]`` or ``[assistant]``, with ``{{name}}`` placeholders. The set's
name is the prompt version on the wire; a released set is never edited, a new wording is a new folder.

Placeholders are replaced in one pass, so a value that itself looks like a placeholder stays as it is. Values come from
models and from strangers: :func:`render_token_ids` tokenizes message contents without the tokenizer's added tokens, so
that no text can open a chat turn or inject a control token; only the chat template's own scaffolding may hold them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import Any, Protocol

from stepalign.errors import PromptError
from stepalign.prompts.content_tokens import ContentTokenizer, content_token_ids

_ROLE = re.compile(r"^\[(system|user|assistant)\]$", re.MULTILINE)
_PLACEHOLDER = re.compile(r"\{\{([a-z_]+)\}\}")
_SLOT = "\ue000{}\ue001"
_SLOT_PATTERN = re.compile("\ue000([0-9]+)\ue001")

Message = dict[str, str]

OWN_OPTIONS = frozenset({"tokenizer", "messages", "conversation", "tokenize", "add_generation_prompt"})
"""Arguments of :func:`render_token_ids` and of the tokenizer that are no options of a chat template."""


class ChatTokenizer(ContentTokenizer, Protocol):
    """The part of a transformers tokenizer that rendering uses."""

    def apply_chat_template(self, conversation: list[Message], **kwargs: Any) -> Any: ...

    def __call__(self, text: str, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Prompt:
    """One prompt file: a list of messages with placeholders."""

    name: str
    version: str
    messages: tuple[tuple[str, str], ...]

    @cached_property
    def fields(self) -> frozenset[str]:
        return frozenset(name for _, body in self.messages for name in _PLACEHOLDER.findall(body))

    @cached_property
    def _templates(self) -> list[tuple[str, str]]:
        """Each message's role and its content as ``str.format_map`` takes it."""
        return [(role, _template(body)) for role, body in self.messages]

    def fill(self, **values: str) -> list[Message]:
        """Fill the placeholders. Raises PromptError when a value is missing or not used by the file."""
        if self.fields != values.keys():
            raise PromptError(
                f"prompt {self.version}/{self.name} takes {sorted(self.fields)}, it was given {sorted(values)}"
            )
        return [{"role": role, "content": template.format_map(values)} for role, template in self._templates]


def _template(body: str) -> str:
    texts = [part.replace("{", "{{").replace("}", "}}") for part in _PLACEHOLDER.split(body)]
    texts[1::2] = [f"{{{name}}}" for name in texts[1::2]]
    return "".join(texts)


@cache
def load_prompt(version: str, name: str) -> Prompt:
    """Load ``prompts/<version>/<name>.txt``. Raises PromptError when there is none."""
    path = files(__name__) / version / f"{name}.txt"
    if not re.fullmatch(r"[a-z0-9-]+", version) or not path.is_file():
        raise PromptError(f"there is no prompt {name!r} in the prompt set {version!r}; sets: {prompt_sets()}")
    parts = _ROLE.split(path.read_text(encoding="utf-8"))
    if parts[0].strip() or len(parts) < 3:
        raise PromptError(f"prompt {version}/{name} must begin with a role line such as [user]")
    messages = tuple((role, body.strip()) for role, body in zip(parts[1::2], parts[2::2], strict=True))
    return Prompt(name=name, version=version, messages=messages)


def has_prompt(version: str, name: str) -> bool:
    """Whether the set has this prompt."""
    return bool(re.fullmatch(r"[a-z0-9-]+", version)) and (files(__name__) / version / f"{name}.txt").is_file()


def prompt_sets() -> list[str]:
    """The prompt sets that this version ships."""
    return sorted(entry.name for entry in files(__name__).iterdir() if (entry / "student.txt").is_file())


def render_token_ids(tokenizer: ChatTokenizer, messages: list[Message], **template_options: Any) -> list[int]:
    """Messages → token ids through the tokenizer's chat template, no content giving an added token.

    Raises PromptError when the chat template drops or repeats a message's content and when
    :func:`~stepalign.prompts.content_tokens.content_token_ids` does.
    """
    parts = render_parts(tokenizer, messages, add_generation_prompt=True, **template_options)
    return [token_id for _, token_ids in parts for token_id in token_ids]


def render_parts(
    tokenizer: ChatTokenizer, messages: list[Message], *, add_generation_prompt: bool, **template_options: Any
) -> list[tuple[int | None, list[int]]]:
    """The parts that :func:`render_token_ids` joins: contents by the message's index, None for the template's own."""
    slots = [{"role": m["role"], "content": _SLOT.format(i)} for i, m in enumerate(messages)]
    scaffold: str = tokenizer.apply_chat_template(
        slots, tokenize=False, add_generation_prompt=add_generation_prompt, **template_options
    )
    parts = _SLOT_PATTERN.split(scaffold)
    if [int(index) for index in parts[1::2]] != list(range(len(messages))):
        raise PromptError("the chat template must write every message exactly once and in order")
    rendered: list[tuple[int | None, list[int]]] = []
    for i, part in enumerate(parts):
        if i % 2:
            rendered.append((int(part), content_token_ids(tokenizer, messages[int(part)]["content"])))
        elif part:
            rendered.append((None, tokenizer(part, add_special_tokens=False)["input_ids"]))
    return rendered
