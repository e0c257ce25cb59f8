"""A frozen causal language model in this process, through transformers: greedy, micro-batched, one worker thread.

The model comes from a local folder, safetensors only, without remote code. Prompts of a batch are padded on the left
and masked; a sequence that is no longer wanted ends with its next token. All tokenizer calls happen on the event
loop: fast tokenizers refuse to be used by two threads at once.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

from stepalign.errors import ConfigError, PromptError, PromptTooLongError
from stepalign.prompts import Message, render_token_ids
from stepalign.prompts.content_tokens import control_ids
from stepalign.types import CriticIdentity, FinishReason
from stepalign_critic.backends.base import Generation, RenderedPrompt
from stepalign_critic.backends.micro_batcher import MicroBatcher, Wanted
from stepalign_critic.backends.weights import weights_revision
from stepalign_critic.errors import NotReadyError
from stepalign_models.devices import choose_device
from stepalign_run.config import CriticServerSection


@dataclass(frozen=True)
class _Loaded:
    """A model on its device. ``eos`` holds every id that ends an answer, ``pad`` fills the left of short prompts."""

    model: Any
    tokenizer: Any
    revision: str
    eos: tuple[int, ...]
    pad: int


class _Unwanted(StoppingCriteria):
    """Ends the sequences that are no longer wanted."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # pyright: ignore
        """Token ids ``[B, T]`` → whether each sequence ends, ``[B]``."""
        ended = [not self._wanted(row) for row in range(len(input_ids))]
        return torch.tensor(ended, device=input_ids.device)


class TransformersBackend:
    """Serves ``section.path``. Budgets, device, dtype and batching come from the configuration."""

    name = "transformers"
    recovers = False

    def __init__(self, section: CriticServerSection) -> None:
        if section.path is None:
            raise ConfigError("backend 'transformers' needs critic.path, the folder of the critic model")
        self._section = section
        self._path = section.path
        self._loaded: _Loaded | None = None
        self._batcher = MicroBatcher[list[int], list[int]](
            self._complete,
            max_batch=section.max_batch,
            max_queue=section.max_queue,
            wait_seconds=section.batch_wait_ms / 1000,
            size=len,
        )

    @property
    def _ready(self) -> _Loaded:
        if self._loaded is None:
            raise NotReadyError("the critic model is loading", "loading")
        return self._loaded

    def identity(self, prompt_version: str) -> CriticIdentity:
        return CriticIdentity(
            model=self._path.resolve().name,
            weights_revision=self._ready.revision,
            prompt_version=prompt_version,
            backend=self.name,
        )

    async def start(self) -> None:
        self._loaded = await asyncio.to_thread(_load, self._path, self._section)
        self._batcher.start()

    def render(self, messages: list[Message]) -> list[int]:
        return render_token_ids(self._ready.tokenizer, messages, **self._section.chat_template_options)

    async def generate(self, prompt: RenderedPrompt) -> Generation:
        """Greedy completion, ended by EOS or by ``max_new_tokens``. ``completion_tokens`` counts the EOS."""
        token_ids, budget = prompt.token_ids, self._section.max_prompt_tokens
        assert token_ids is not None, "the service renders prompts with this backend's tokenizer"
        if len(token_ids) > budget:
            raise PromptTooLongError("the critique prompt", len(token_ids), budget, "critic.max_prompt_tokens")
        loaded = self._ready
        completion = await self._batcher.submit(token_ids)
        ended = bool(completion) and completion[-1] in loaded.eos
        text: str = loaded.tokenizer.decode(
            completion[:-1] if ended else completion, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        reason = FinishReason.STOP if ended else FinishReason.LENGTH
        return Generation(text, reason, prompt_tokens=len(token_ids), completion_tokens=len(completion))

    def expected_wait_seconds(self) -> float | None:
        return self._batcher.expected_wait_seconds()

    def healthy(self) -> bool:
        return self._batcher.running

    async def stop(self) -> None:
        await self._batcher.stop()

    def _complete(self, prompts: list[list[int]], wanted: Wanted) -> list[list[int]]:
        """Token ids of prompts → token ids of completions, each cut after its first EOS. Runs in the worker thread.

        Prompts that are no longer ``wanted`` may break off anywhere.
        """
        loaded = self._ready
        width = max(map(len, prompts))
        input_ids = torch.full((len(prompts), width), loaded.pad, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            attention_mask[row, width - len(prompt) :] = 1
        device = loaded.model.device
        with torch.inference_mode():
            output = loaded.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([_Unwanted(wanted)]),
            )
        return [_through_eos(row, loaded.eos) for row in output[:, width:].tolist()]


def _through_eos(token_ids: list[int], eos: tuple[int, ...]) -> list[int]:
    end = next((i for i, token in enumerate(token_ids) if token in eos), len(token_ids) - 1)
    return token_ids[: end + 1]


def _load(path: Path, section: CriticServerSection) -> _Loaded:
    """Load from ``path``. Raises ConfigError on a folder, a device or budgets that cannot be served."""
    revision = weights_revision(path)
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        # Here and not with the first request: it takes a second.
        control_ids(tokenizer)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=getattr(torch, section.dtype.value),
        )
        device = choose_device(
            section.device,
            cuda=torch.cuda.is_available(),
            mps=torch.backends.mps.is_available(),
            xpu=torch.xpu.is_available(),
        )
        model = model.to(device).eval()
    except (OSError, ValueError, RuntimeError, PromptError) as error:
        raise ConfigError(f"the critic model in {path} cannot be loaded: {error}") from error
    _check_positions(model, section)
    eos = _eos_ids(model, tokenizer, path)
    pad = eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # A whole new configuration: the one that comes with a model may sample or penalise repetition.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=section.max_new_tokens, eos_token_id=list(eos), pad_token_id=pad
    )
    return _Loaded(model, tokenizer, revision, eos, pad)


def _check_positions(model: Any, section: CriticServerSection) -> None:
    positions = model.config.to_dict().get("max_position_embeddings")
    needed = section.max_prompt_tokens + section.max_new_tokens
    if positions is not None and needed > positions:
        raise ConfigError(
            f"critic.max_prompt_tokens + critic.max_new_tokens is {needed}; the model has {positions} positions"
        )


def _eos_ids(model: Any, tokenizer: Any, path: Path) -> tuple[int, ...]:
    """Every id that ends an answer: a chat model's generation configuration may name several."""
    configured = model.generation_config.eos_token_id
    if configured is None:
        configured = tokenizer.eos_token_id
    if configured is None:
        raise ConfigError(f"neither generation_config.json nor the tokenizer in {path} names an EOS token")
    return (configured,) if isinstance(configured, int) else tuple(configured)
