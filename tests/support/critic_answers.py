"""Answers of a critic service, for tests that stand in for one."""

from __future__ import annotations

from stepalign.critique.alignment import in_sent_text, validate_critique
from stepalign.types import CriticIdentity, Critique, CritiqueRequest, CritiqueResponse, Usage
from stepalign_critic.service import context_of, reading_of


def answer_of(request: CritiqueRequest, critic_text: str) -> CritiqueResponse:
    """The response to ``request`` of a critic that wrote ``critic_text``."""
    split = request.split()
    checked = validate_critique(critic_text, split.tagged, known_answer=request.answer)
    critique = in_sent_text(checked, split) if isinstance(checked, Critique) else None
    return CritiqueResponse(
        id="c",
        attempt=reading_of(split),
        critique=critique,
        failure=None if isinstance(checked, Critique) else checked,
        context=context_of(checked, split.tagged, request.mode) if isinstance(checked, Critique) else None,
        critic=CriticIdentity(model="m", weights_revision="w", prompt_version="p", backend="b"),
        usage=Usage(prompt_tokens=1, completion_tokens=1),
    )
