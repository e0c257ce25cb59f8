"""Backends by their names in the configuration. A model library is imported only when its backend is made."""

from __future__ import annotations

from stepalign_critic.backends.base import Backend
from stepalign_run.config import CriticServerSection


def create_backend(section: CriticServerSection) -> Backend:
    """The backend that the configuration names, not started. Raises ConfigError when it is incomplete."""
    if section.backend == "program":
        from stepalign_critic.backends.program import ProgramBackend

        return ProgramBackend.from_config(section)
    if section.backend == "openai":
        from stepalign_critic.backends.openai import OpenAIBackend

        return OpenAIBackend(section)
    if section.backend == "vllm":
        from stepalign_critic.backends.vllm import VllmBackend

        return VllmBackend(section)
    from stepalign_critic.backends.transformers import TransformersBackend

    return TransformersBackend(section)
