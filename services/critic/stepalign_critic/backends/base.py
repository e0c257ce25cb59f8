"""The protocol of a backend, which answers a rendered prompt with text, or with a critique by a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from prometheus_client import CollectorRegistry

from stepalign.prompts import Message
from stepalign.types import CriticIdentity, CritiqueRequest, FinishReason, Forced
from stepalign_critic.decoding.plan import Plan


@dataclass(frozen=True)
class RenderedPrompt:
    """A request and the prompt made of it. ``token_ids`` is None when the backend has no tokenizer."""

    request: CritiqueRequest
    messages: list[Message]
    token_ids: list[int] | None


@dataclass(frozen=True)
class Generation:
    """A backend's answer, thinking included and EOS left out. A backend without a tokenizer counts no tokens.

    ``remark`` says why an answer is none, where the backend knows it, such as a refusal of the model's provider.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    remark: str | None = None


@dataclass(frozen=True)
class Alignment:
    """A critique that was decoded by a plan: its marked text, and what the model thought of each step.

    ``p_wrong`` is None where the engine tells no probabilities.
    """

    text: str
    p_wrong: tuple[float, ...] | None
    forced: tuple[Forced, ...]
    prompt_tokens: int
    completion_tokens: int
    truncated: bool = False
    """Whether a budget cut what was written before its answer."""


@runtime_checkable
class Aligning(Protocol):
    """A backend that can decode by a plan, and does where ``aligns``."""

    @property
    def aligns(self) -> bool:
        """Whether this one is configured to."""
        ...

    async def align(self, prompt: RenderedPrompt, plan: Plan) -> Alignment:
        """A critique of the plan's attempt. Raises the errors of ``Backend.generate``, and BudgetTooSmallError."""
        ...


@runtime_checkable
class Measured(Protocol):
    """A backend whose engine has metrics of its own."""

    @property
    def registry(self) -> CollectorRegistry:
        """The registry that collects them."""
        ...


@runtime_checkable
class Explained(Protocol):
    """A backend that knows why it is unhealthy."""

    def trouble(self) -> str:
        """What is wrong and how to mend it, for an operator. Called while the backend is unhealthy."""
        ...


class Backend(Protocol):
    """A frozen critic. The same prompt gets the same answer, in any batch.

    ``render``, ``generate`` and ``identity`` are for started backends; before that they raise NotReadyError.
    """

    @property
    def name(self) -> str:
        """The backend's name in the configuration."""
        ...

    @property
    def recovers(self) -> bool:
        """Whether an unhealthy backend may recover by itself. Else only a new process can serve."""
        ...

    def identity(self, prompt_version: str) -> CriticIdentity:
        """Model, weights, prompts and backend of the critiques; fixed while the process lives."""
        ...

    async def start(self) -> None:
        """Load the model. Raises ConfigError on one that cannot be served. Must not block the event loop."""
        ...

    def render(self, messages: list[Message]) -> list[int] | None:
        """Messages → token ids, or None without a tokenizer. Called on the event loop. Raises PromptError."""
        ...

    async def generate(self, prompt: RenderedPrompt) -> Generation:
        """Answer one prompt; the backend batches. Cancelling gives up the prompt and its place in the queue.

        Raises PromptTooLongError and UnsupportedRequestError on a prompt that it will never answer, SaturatedError,
        EngineError, EngineTimeoutError and NotReadyError on one that it cannot answer now.
        """
        ...

    def expected_wait_seconds(self) -> float | None:
        """Expected wait of a new request before its generation; None when it is not known.

        Called on the event loop in every state, before each request that has a deadline.
        """
        ...

    def healthy(self) -> bool:
        """Whether a started backend still works."""
        ...

    async def stop(self) -> None:
        """Release everything. Allowed in every state."""
        ...
