"""A frozen causal language model in vLLM's engine in this process: greedy, continuous batching, prefix caching.

One process is one engine: replicas are added with the container. The prompt's shared part, instructions and worked
examples, comes first, so the prefix cache holds it. Each API key has a salt of its own, so requests of different keys
never share cached blocks.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from uuid import uuid4

from prometheus_client import REGISTRY, CollectorRegistry

from stepalign.errors import ConfigError, PromptError, PromptTooLongError
from stepalign.prompts import Message, render_token_ids
from stepalign.prompts.content_tokens import control_ids
from stepalign.types import CriticIdentity, FinishReason
from stepalign_critic.backends.admission import Admission
from stepalign_critic.backends.base import Generation, RenderedPrompt
from stepalign_critic.backends.weights import weights_revision
from stepalign_critic.errors import EngineError, NotReadyError
from stepalign_critic.tenant import caller
from stepalign_run.config import CriticServerSection


class VllmBackend:
    """Serves ``section.path`` with vLLM's ``AsyncLLM``."""

    name = "vllm"
    recovers = False

    def __init__(self, section: CriticServerSection) -> None:
        if section.path is None:
            raise ConfigError("backend 'vllm' needs critic.path, the folder of the critic model")
        self._section = section
        self._path: Path = section.path
        self._admission = Admission(section.max_batch, section.max_queue)
        self._engine: Any = None
        self._tokenizer: Any = None
        self._revision = ""

    @property
    def _ready(self) -> Any:
        if self._engine is None:
            raise NotReadyError("the critic model is loading", "loading")
        return self._engine

    def identity(self, prompt_version: str) -> CriticIdentity:
        assert self._ready is not None
        return CriticIdentity(
            model=self._path.resolve().name,
            weights_revision=self._revision,
            prompt_version=prompt_version,
            backend=self.name,
        )

    async def start(self) -> None:
        self._revision = await asyncio.to_thread(weights_revision, self._path)
        self._tokenizer, engine = await asyncio.to_thread(_load, self._path, self._section)
        self._engine = engine

    def render(self, messages: list[Message]) -> list[int]:
        assert self._ready is not None
        return render_token_ids(self._tokenizer, messages, **self._section.chat_template_options)

    async def generate(self, prompt: RenderedPrompt) -> Generation:
        """Greedy completion. Cancelling aborts it in the engine."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.inputs import TokensPrompt  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        token_ids, budget = prompt.token_ids, self._section.max_prompt_tokens
        assert token_ids is not None, "the service renders prompts with this backend's tokenizer"
        if len(token_ids) > budget:
            raise PromptTooLongError("the critique prompt", len(token_ids), budget, "critic.max_prompt_tokens")
        tokens: Any = TokensPrompt(prompt_token_ids=token_ids)
        salt = caller()
        if salt is not None:
            tokens["cache_salt"] = salt
        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=self._section.max_new_tokens,
            skip_special_tokens=False,
            # By default the engine would hand over the whole text again with each of its tokens.
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        last: Any = None
        async with self._admission.place():
            try:
                async for partial in self._ready.generate(tokens, parameters, f"crq-{uuid4().hex}"):
                    last = partial
            except Exception as error:
                raise EngineError(f"vLLM failed: {type(error).__name__}: {error}") from error
        if last is None or last.outputs[0].finish_reason not in ("stop", "length"):
            reason = None if last is None else last.outputs[0].finish_reason
            raise EngineError(f"vLLM did not finish this request: {reason}")
        output = last.outputs[0]
        return Generation(
            output.text,
            FinishReason(output.finish_reason),
            prompt_tokens=len(token_ids),
            completion_tokens=len(output.token_ids),
        )

    def expected_wait_seconds(self) -> float | None:
        return self._admission.expected_wait_seconds()

    @property
    def registry(self) -> CollectorRegistry:
        """vLLM's own metrics, among them hits of the prefix cache."""
        return REGISTRY

    def healthy(self) -> bool:
        return self._engine is not None and not self._engine.errored

    async def stop(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.shutdown)


def _load(path: Path, section: CriticServerSection) -> tuple[Any, Any]:
    """The tokenizer and the engine. Raises ConfigError on a model or arguments that vLLM does not take."""
    from transformers import AutoTokenizer
    from vllm.engine.arg_utils import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
    from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]

    settings = section.vllm
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        # Here and not with the first request: it takes a second.
        control_ids(tokenizer)
        arguments = AsyncEngineArgs(
            **{
                "model": str(path),
                "dtype": section.dtype.value,
                "load_format": "safetensors",
                "trust_remote_code": False,
                "max_model_len": section.max_prompt_tokens + section.max_new_tokens,
                "max_num_seqs": section.max_batch,
                "enable_prefix_caching": True,
                "gpu_memory_utilization": settings.gpu_memory_utilization,
                "tensor_parallel_size": settings.tensor_parallel_size,
                **settings.engine_args,
            }
        )
        return tokenizer, AsyncLLM.from_engine_args(arguments)
    except (OSError, ValueError, TypeError, RuntimeError, PromptError) as error:
        raise ConfigError(f"vLLM cannot serve the critic model in {path}: {error}") from error
