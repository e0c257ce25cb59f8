"""A domain's exact checker as a critic: no model, no tokenizer.

A checker is a function ``(question, attempt) -> critique text`` in the entry-point group ``stepalign.checkers``. It
raises ValueError on a question that it cannot handle.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

from stepalign.plugins import CHECKERS, Checker, load_plugin
from stepalign.prompts import Message
from stepalign.types import CriticIdentity, FinishReason
from stepalign_critic.backends.admission import Admission
from stepalign_critic.backends.base import Generation, RenderedPrompt
from stepalign_critic.errors import EngineError, NotReadyError, UnsupportedRequestError
from stepalign_run.config import CriticServerSection


class ProgramBackend:
    """Runs ``checker``. ``revision`` stands for its code in every critique's identity."""

    name = "program"
    recovers = True

    def __init__(
        self, model: str, checker: Checker, revision: str, *, max_running: int = 32, max_waiting: int = 256
    ) -> None:
        self._model = model
        self._checker = checker
        self._revision = revision
        self._admission = Admission(max_running, max_waiting)
        self._threads = ThreadPoolExecutor(max_running, thread_name_prefix="checker")

    @classmethod
    def from_config(cls, section: CriticServerSection) -> ProgramBackend:
        """Find ``critic.checker``. Raises ConfigError when no installed distribution has it."""
        checker = load_plugin(CHECKERS, "critic.checker", section.checker)
        return cls(
            checker.name,
            checker.function,
            checker.revision,
            max_running=section.max_batch,
            max_waiting=section.max_queue,
        )

    def identity(self, prompt_version: str) -> CriticIdentity:
        return CriticIdentity(
            model=self._model, weights_revision=self._revision, prompt_version=prompt_version, backend=self.name
        )

    async def start(self) -> None:
        return

    def render(self, messages: list[Message]) -> None:
        return None

    async def generate(self, prompt: RenderedPrompt) -> Generation:
        """The checker's text. It reads the request, not the prompt, and no part of it is a token."""
        question, attempt = prompt.request.question, prompt.request.split().tagged
        leave = await self._admission.enter()
        # Log lines of the checker carry the ids of its request.
        context = copy_context()
        try:
            running = asyncio.get_running_loop().run_in_executor(
                self._threads, lambda: context.run(self._checker, question, attempt)
            )
        except RuntimeError as error:
            leave(False)
            raise NotReadyError(f"the checker takes no more requests: {error}", "stopping") from None
        # A thread cannot be interrupted: it keeps its place to its end, even when nobody waits for it.
        running.add_done_callback(lambda done: leave(not done.cancelled() and done.exception() is None))
        try:
            text = await asyncio.shield(running)
        except ValueError as error:
            said = f"the checker {self._model!r} cannot handle this request: {error}"
            raise UnsupportedRequestError(said) from None
        except Exception as error:
            raise EngineError(f"the checker {self._model!r} failed: {type(error).__name__}: {error}") from error
        return Generation(text=text, finish_reason=FinishReason.STOP, prompt_tokens=0, completion_tokens=0)

    def expected_wait_seconds(self) -> float | None:
        return self._admission.expected_wait_seconds()

    def healthy(self) -> bool:
        return True

    async def stop(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
