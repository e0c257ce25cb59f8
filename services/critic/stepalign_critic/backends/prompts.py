"""What the backends with a tokenizer do with a prompt before it is decoded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from stepalign.errors import PromptTooLongError
from stepalign_critic.backends.base import RenderedPrompt
from stepalign_critic.decoding.draft import Draft, DraftTokens, fitting_draft
from stepalign_critic.decoding.plan import Plan
from stepalign_run.config import CriticServerSection

Result = TypeVar("Result")


def token_ids_of(prompt: RenderedPrompt) -> list[int]:
    """The ids of a prompt that this backend has rendered."""
    assert prompt.token_ids is not None, "the service renders prompts with this backend's tokenizer"
    return prompt.token_ids


def fitting_ids(prompt: RenderedPrompt, section: CriticServerSection) -> list[int]:
    """The ids of a prompt. Raises PromptTooLongError when they are over ``critic.max_prompt_tokens``."""
    token_ids, budget = token_ids_of(prompt), section.max_prompt_tokens
    if len(token_ids) > budget:
        raise PromptTooLongError("the critique prompt", len(token_ids), budget, "critic.max_prompt_tokens")
    return token_ids


class DraftThread:
    """Makes drafts off the event loop, in a thread that alone uses its tokenizer.

    A tokenizer serves one thread at a time. A long attempt takes it longer than other requests should wait.
    """

    def __init__(self, tokenizer: Any, section: CriticServerSection) -> None:
        self.drafts = DraftTokens(tokenizer, section.chat_template_options)
        self._section = section
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="critic-drafts")

    async def fitting(self, plan: Plan, prompt: list[int]) -> Draft:
        """The draft after ``prompt``. Raises as :func:`fitting_draft`."""
        return await self.call(fitting_draft, self.drafts, plan, prompt, self._section)

    async def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function that uses ``drafts``."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def stop(self) -> None:
        """End the thread once it has done what it was asked."""
        self._thread.shutdown(wait=False)
