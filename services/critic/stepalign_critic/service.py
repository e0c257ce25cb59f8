"""One request → one validated critique, or a typed failure: render the prompt, generate, cut the thinking, validate.

The service knows prompts and alignment; it knows nothing of HTTP and nothing of models.
"""

from __future__ import annotations

import hashlib
from uuid import uuid4

from stepalign.alignment import validate_critique
from stepalign.errors import PromptError
from stepalign.prompts import Message, load_prompt
from stepalign.types import (
    CriticIdentity,
    Critique,
    CritiqueFailure,
    CritiqueRequest,
    CritiqueResponse,
    FailureReason,
    Usage,
)
from stepalign_critic.backends.base import Backend, Generation, RenderedPrompt
from stepalign_critic.lifecycle import Lifecycle

NO_REFERENCE = "none"
_THINK, _END_THINK = "<think>", "</think>"
_FIELDS = frozenset({"question", "reference_solution", "attempt", "nonce"})


class CriticService:
    """Critiques attempts with ``backend`` and the prompt ``critique`` of the set ``prompts_version``.

    Raises PromptError when there is no such prompt, or when it asks for a field that no request can fill.
    """

    def __init__(self, backend: Backend, prompts_version: str) -> None:
        self._backend = backend
        self._prompt = load_prompt(prompts_version, "critique")
        unknown = self._prompt.fields - _FIELDS
        if unknown:
            raise PromptError(f"prompt {prompts_version}/critique asks for {sorted(unknown)}; known: {sorted(_FIELDS)}")
        self.lifecycle = Lifecycle(backend)

    def identity(self) -> CriticIdentity:
        """What makes the critiques. Raises NotReadyError until the backend started."""
        return self._backend.identity(self._prompt.version)

    def messages(self, request: CritiqueRequest) -> list[Message]:
        """The prompt's messages. The same request gives the same messages, its nonce included."""
        values = {
            "question": request.question,
            "reference_solution": NO_REFERENCE if request.reference_solution is None else request.reference_solution,
            "attempt": request.attempt,
            "nonce": hashlib.sha256(request.model_dump_json().encode()).hexdigest()[:8],
        }
        return self._prompt.fill(**{name: values[name] for name in self._prompt.fields})

    async def critique(self, request: CritiqueRequest) -> CritiqueResponse:
        """Answer one request. Raises ServiceError or PromptTooLongError when there is no answer of the backend."""
        refusal = self.lifecycle.refusal()
        if refusal is not None:
            raise refusal
        messages = self.messages(request)
        prompt = RenderedPrompt(request, messages, self._backend.render(messages))
        generation = await self._backend.generate(prompt)
        outcome = read_answer(generation, request)
        return CritiqueResponse(
            id=f"crq_{uuid4().hex}",
            critique=outcome if isinstance(outcome, Critique) else None,
            failure=outcome if isinstance(outcome, CritiqueFailure) else None,
            critic=self.identity(),
            usage=Usage(prompt_tokens=generation.prompt_tokens, completion_tokens=generation.completion_tokens),
        )


def read_answer(generation: Generation, request: CritiqueRequest) -> Critique | CritiqueFailure:
    """A backend's text → the critique that follows its thinking, validated against the attempt."""
    _, ended, answer = generation.text.rpartition(_END_THINK)
    if not ended and _THINK in generation.text:
        return CritiqueFailure(
            reason=FailureReason.TRUNCATED, detail="the critic's thinking never ended", text=generation.text
        )
    return validate_critique(
        answer,
        request.attempt,
        known_answer=request.answer,
        critic_finish_reason=generation.finish_reason,
    )
