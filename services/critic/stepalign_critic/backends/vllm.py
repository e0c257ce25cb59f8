"""A frozen causal language model in vLLM's engine in this process: greedy, continuous batching, prefix caching.

One process is one engine: replicas are added with the container. The prompt's shared part, instructions and worked
examples, comes first, so the prefix cache holds it. Each API key has a salt of its own, so requests of different keys
never share cached blocks.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from prometheus_client import REGISTRY, CollectorRegistry

from stepalign.errors import ConfigError, PromptError
from stepalign.prompts import Message, render_token_ids
from stepalign.prompts.content_tokens import control_ids
from stepalign.types import CriticIdentity, FinishReason
from stepalign_critic.backends.admission import Admission
from stepalign_critic.backends.base import Alignment, Generation, RenderedPrompt
from stepalign_critic.backends.prompts import DraftThread, fitting_ids, token_ids_of
from stepalign_critic.backends.thinking import Thinking
from stepalign_critic.backends.together import together
from stepalign_critic.backends.weights import weights_revision
from stepalign_critic.decoding.bounds import cut_by_tokens
from stepalign_critic.decoding.draft import Asked, Draft
from stepalign_critic.decoding.grammar import to_lark
from stepalign_critic.decoding.plan import Plan
from stepalign_critic.errors import EngineError, NotReadyError
from stepalign_critic.tenant import caller
from stepalign_run.config import CriticServerSection


class VllmBackend:
    """Serves ``section.path`` with vLLM's ``AsyncLLM``."""

    name = "vllm"
    recovers = False
    aligns = True

    def __init__(self, section: CriticServerSection) -> None:
        if section.path is None:
            raise ConfigError("backend 'vllm' needs critic.path, the folder of the critic model")
        self._section = section
        self._path: Path = section.path
        self._admission = Admission(section.max_batch, section.max_queue)
        self._engine: Any = None
        self._tokenizer: Any = None
        self._drafts: DraftThread | None = None
        self._thinking: Thinking | None = None
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
        own = await asyncio.to_thread(_load_tokenizer, self._path)
        self._drafts = DraftThread(own, self._section)
        self._thinking = Thinking.of(self._tokenizer, (self._tokenizer.eos_token_id,))
        self._engine = engine

    def render(self, messages: list[Message]) -> list[int]:
        assert self._ready is not None
        return render_token_ids(self._tokenizer, messages, **self._section.chat_template_options)

    async def generate(self, prompt: RenderedPrompt) -> Generation:
        """Greedy completion. Cancelling aborts it in the engine."""
        token_ids = fitting_ids(prompt, self._section)
        async with self._admission.place():
            output = await self._complete(token_ids, max_tokens=self._section.max_new_tokens)
        return Generation(
            output.text,
            FinishReason(output.finish_reason),
            prompt_tokens=len(token_ids),
            completion_tokens=len(output.token_ids),
        )

    async def align(self, prompt: RenderedPrompt, plan: Plan) -> Alignment:
        """A critique by ``plan``, after the model's thought if it thinks.

        What is copied is read as part of a prompt, and read once: the engine's prefix cache holds it.
        """
        from vllm.sampling_params import StructuredOutputsParams  # pyright: ignore[reportMissingImports]

        assert self._ready is not None
        thread = self._drafts
        assert thread is not None
        draft = await thread.fitting(plan, token_ids_of(prompt))
        async with self._admission.place():
            thought = await self._think(plan, draft)
            draft = draft.after(thought)
            choosing = plan.choose(draft.scores((await self._logprobs(draft)).__getitem__))
            remainder = await thread.call(plan.remainder, choosing.place, thread.drafts.count)
            answer, truncated = await thread.call(thread.drafts.answer, plan, draft, remainder), False
            text = ""
            if remainder.grammar is not None:
                following = await thread.call(thread.drafts.following, plan, draft, remainder)
                output = await self._complete(
                    following,
                    max_tokens=self._section.max_new_tokens,
                    structured_outputs=StructuredOutputsParams(grammar=to_lark(remainder.grammar)),
                )
                text = remainder.open_text + output.text
                answer = [*answer, *output.token_ids]
                truncated = output.finish_reason == FinishReason.LENGTH and "</answer>" not in text
        # What the whole budget has cut is no bound of a part: it fails as truncated.
        finished = plan.finish(choosing, text, () if truncated else cut_by_tokens(text))
        return Alignment(
            finished.text,
            choosing.p_wrong,
            finished.forced,
            prompt_tokens=draft.read - len(thought),
            completion_tokens=len(thought) + len(answer),
            truncated=truncated,
        )

    async def _think(self, plan: Plan, draft: Draft) -> list[int]:
        """The thought before a critique. In a conversation each answer is a word, without a thought."""
        prompt = draft.ids[: draft.prompt]
        opened = None if self._thinking is None else self._thinking.is_open(prompt)
        if self._thinking is None or plan.conversation is not None or opened is False:
            return []
        if opened is None:
            first = await self._complete(prompt, max_tokens=1)
            if list(first.token_ids) != [self._thinking.start]:
                return []
        output = await self._complete(
            prompt, max_tokens=self._section.max_new_tokens, stop_token_ids=[self._thinking.end]
        )
        return self._thinking.thought(bool(opened), list(output.token_ids))

    async def _logprobs(self, draft: Draft) -> dict[Asked, list[float]]:
        """What the draft asks for: of words, one token each after what comes before it; of copies, the prompt's own."""
        asked = [each for piece in draft.asked for each in piece]
        words = [each for each in asked if len(each.ids) > 1]
        found: dict[Asked, list[float]] = {}
        if words:
            # The longest first: the others find their beginning in the cache.
            found[words[-1]] = await self._word(draft, words[-1])
            calls = [partial(self._word, draft, each) for each in words[:-1]]
            rest = await together(calls, max(1, len(calls)))
            found |= dict(zip(words[:-1], rest, strict=True))
        copies = [each for each in asked if len(each.ids) == 1]
        if copies:
            output = await self._request(draft.ids, max_tokens=1, prompt_logprobs=0)
            for each in copies:
                found[each] = [output.prompt_logprobs[each.place + 1][each.ids[0]].logprob]
        return found

    async def _word(self, draft: Draft, asked: Asked) -> list[float]:
        ids = list(asked.ids)
        output = await self._complete(draft.ids[: asked.place + 1], max_tokens=1, logprob_token_ids=ids)
        return [output.logprobs[0][token].logprob for token in ids]

    async def _complete(self, token_ids: list[int], **parameters: Any) -> Any:
        return (await self._request(token_ids, **parameters)).outputs[0]

    async def _request(self, token_ids: list[int], **parameters: Any) -> Any:
        """The engine's output, greedy. Raises EngineError when there is none."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.inputs import TokensPrompt  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        tokens: Any = TokensPrompt(prompt_token_ids=token_ids)
        salt = caller()
        if salt is not None:
            tokens["cache_salt"] = salt
        sampling = SamplingParams(
            temperature=0.0,
            skip_special_tokens=False,
            # By default the engine would hand over the whole text again with each of its tokens.
            output_kind=RequestOutputKind.FINAL_ONLY,
            **parameters,
        )
        last: Any = None
        try:
            async for partial in self._ready.generate(tokens, sampling, f"crq-{uuid4().hex}"):
                last = partial
        except Exception as error:
            raise EngineError(f"vLLM failed: {type(error).__name__}: {error}") from error
        if last is None or last.outputs[0].finish_reason not in ("stop", "length"):
            reason = None if last is None else last.outputs[0].finish_reason
            raise EngineError(f"vLLM did not finish this request: {reason}")
        return last

    def expected_wait_seconds(self) -> float | None:
        return self._admission.expected_wait_seconds()

    @property
    def registry(self) -> CollectorRegistry:
        """vLLM's own metrics, among them hits of the prefix cache."""
        return REGISTRY

    def healthy(self) -> bool:
        return self._engine is not None and not self._engine.errored

    async def stop(self) -> None:
        if self._drafts is not None:
            self._drafts.stop()
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.shutdown)


def _load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    # Here and not with the first request: it takes a second.
    control_ids(tokenizer)
    return tokenizer


def _load(path: Path, section: CriticServerSection) -> tuple[Any, Any]:
    """The tokenizer and the engine. Raises ConfigError on a model or arguments that vLLM does not take."""
    from vllm.engine.arg_utils import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
    from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]

    settings = section.vllm
    try:
        tokenizer = _load_tokenizer(path)
        # A thought may be as long as a critique.
        thinks = Thinking.of(tokenizer, (tokenizer.eos_token_id,)) is not None
        arguments = AsyncEngineArgs(
            **{
                "model": str(path),
                "dtype": section.dtype.value,
                "load_format": "safetensors",
                "trust_remote_code": False,
                "max_model_len": section.max_prompt_tokens + section.max_new_tokens * (1 + thinks),
                "max_num_seqs": section.max_batch,
                "enable_prefix_caching": True,
                # The grammars of critiques bound free text in tokens, which only this one can.
                "structured_outputs_config": {"backend": "guidance"},
                "gpu_memory_utilization": settings.gpu_memory_utilization,
                "tensor_parallel_size": settings.tensor_parallel_size,
                **settings.engine_args,
            }
        )
        return tokenizer, AsyncLLM.from_engine_args(arguments)
    except (OSError, ValueError, TypeError, RuntimeError, PromptError) as error:
        raise ConfigError(f"vLLM cannot serve the critic model in {path}: {error}") from error
