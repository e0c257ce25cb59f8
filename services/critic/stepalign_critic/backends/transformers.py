"""A frozen causal language model in this process, through transformers: greedy, micro-batched, one worker thread.

The model comes from a local folder, safetensors only, without remote code. Prompts of a batch are padded on the left
and masked; a sequence that is no longer wanted ends with its next token. The event loop, the thread of the drafts and
the worker have a tokenizer each: fast tokenizers refuse to be used by two threads at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
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

from stepalign.errors import ConfigError, PromptError
from stepalign.prompts import Message, render_token_ids
from stepalign.prompts.content_tokens import control_ids
from stepalign.types import CriticIdentity, FinishReason
from stepalign_critic.backends.base import Alignment, Generation, RenderedPrompt
from stepalign_critic.backends.micro_batcher import MicroBatcher, Wanted
from stepalign_critic.backends.prompts import DraftThread, fitting_ids, token_ids_of
from stepalign_critic.backends.thinking import Thinking
from stepalign_critic.backends.weights import weights_revision
from stepalign_critic.decoding.draft import Draft, DraftTokens
from stepalign_critic.decoding.drafted import Decoded, DraftedDecoder, Job
from stepalign_critic.decoding.plan import Plan
from stepalign_critic.decoding.tokens import GrammarTokens
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
    drafts: DraftThread
    decoder: DraftedDecoder
    thinking: Thinking | None


@dataclass(frozen=True)
class _Asked:
    """A prompt, and the plan of its critique if there is one."""

    prompt: list[int]
    plan: Plan | None = None
    draft: Draft | None = None

    @property
    def size(self) -> int:
        return len(self.prompt if self.draft is None else self.draft.ids)


_Answered = list[int] | tuple[Decoded, int] | Exception
"""Token ids; or a critique and the tokens of the thought before it; or why there is none."""


class _Unwanted(StoppingCriteria):
    """Ends the sequences that are no longer wanted."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # pyright: ignore
        """Token ids ``[B, T]`` → whether each sequence ends, ``[B]``."""
        ended = [not self._wanted(row) for row in range(len(input_ids))]
        return torch.tensor(ended, device=input_ids.device)


class _UntilThought(StoppingCriteria):
    """Ends the sequences that have thought, and those that do not begin to. ``width`` columns are the prompts'."""

    def __init__(self, width: int, opened: Sequence[bool], thinking: Thinking) -> None:
        self._width, self._opened, self._thinking = width, opened, thinking

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # pyright: ignore
        """Token ids ``[B, T]`` → whether each sequence ends, ``[B]``."""
        made = input_ids[:, self._width :]
        begins = torch.tensor(self._opened, device=input_ids.device) | (made[:, 0] == self._thinking.start)
        return (made == self._thinking.end).any(dim=1) | ~begins


class TransformersBackend:
    """Serves ``section.path``. Budgets, device, dtype and batching come from the configuration."""

    name = "transformers"
    recovers = False
    aligns = True

    def __init__(self, section: CriticServerSection) -> None:
        if section.path is None:
            raise ConfigError("backend 'transformers' needs critic.path, the folder of the critic model")
        self._section = section
        self._path = section.path
        self._loaded: _Loaded | None = None
        self._batcher = MicroBatcher[_Asked, _Answered](
            self._answer,
            max_batch=section.max_batch,
            max_queue=section.max_queue,
            wait_seconds=section.batch_wait_ms / 1000,
            size=lambda asked: asked.size,
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
        token_ids = fitting_ids(prompt, self._section)
        loaded = self._ready
        completion = await self._batcher.submit(_Asked(token_ids))
        assert isinstance(completion, list)
        ended = bool(completion) and completion[-1] in loaded.eos
        text: str = loaded.tokenizer.decode(
            completion[:-1] if ended else completion, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        reason = FinishReason.STOP if ended else FinishReason.LENGTH
        return Generation(text, reason, prompt_tokens=len(token_ids), completion_tokens=len(completion))

    async def align(self, prompt: RenderedPrompt, plan: Plan) -> Alignment:
        """A critique by ``plan``, after the model's thought if it thinks."""
        token_ids = token_ids_of(prompt)
        draft = await self._ready.drafts.fitting(plan, token_ids)
        answered = await self._batcher.submit(_Asked(token_ids, plan, draft))
        if isinstance(answered, Exception):
            raise answered
        assert isinstance(answered, tuple)
        decoded, thought = answered
        return Alignment(
            decoded.text,
            decoded.choosing.p_wrong,
            decoded.forced,
            prompt_tokens=draft.read,
            completion_tokens=thought + len(decoded.tokens),
        )

    def expected_wait_seconds(self) -> float | None:
        return self._batcher.expected_wait_seconds()

    def healthy(self) -> bool:
        return self._batcher.running

    async def stop(self) -> None:
        if self._loaded is not None:
            self._loaded.drafts.stop()
        await self._batcher.stop()

    def _answer(self, asked: list[_Asked], wanted: Wanted) -> list[_Answered]:
        """The answers, those with a plan together and the others together. Runs in the worker thread."""
        answers: dict[int, _Answered] = {}
        planned = [i for i, each in enumerate(asked) if each.plan is not None]
        free = [i for i, each in enumerate(asked) if each.plan is None]
        if free:
            completions = self._complete([asked[i].prompt for i in free], lambda row: wanted(free[row]))
            answers |= dict(zip(free, completions, strict=True))
        if planned:
            aligned = self._align([asked[i] for i in planned], lambda row: wanted(planned[row]))
            answers |= dict(zip(planned, aligned, strict=True))
        return [answers[i] for i in range(len(asked))]

    def _align(self, asked: list[_Asked], wanted: Wanted) -> list[_Answered]:
        loaded = self._ready
        drafts = [each.draft for each in asked if each.draft is not None]
        prompts = [draft.ids[: draft.prompt] for draft in drafts]
        thoughts = self._thoughts(asked, prompts, wanted)
        jobs = [
            Job(each.plan, draft.after(thought))
            for each, draft, thought in zip(asked, drafts, thoughts, strict=True)
            if each.plan is not None
        ]
        decoded = loaded.decoder.decode(jobs, wanted)
        return [
            result if isinstance(result, Exception) else (result, len(thought))
            for result, thought in zip(decoded, thoughts, strict=True)
        ]

    def _thoughts(self, asked: list[_Asked], prompts: list[list[int]], wanted: Wanted) -> list[list[int]]:
        """What the model thinks before each critique. In a conversation each answer is a word, without a thought."""
        thinking = self._ready.thinking
        thoughts = [list[int]() for _ in prompts]
        if thinking is None:
            return thoughts
        alone = [i for i, each in enumerate(asked) if each.plan is not None and each.plan.conversation is None]
        thinks = [i for i in alone if thinking.is_open(prompts[i]) is not False]
        if thinks:
            opened = [bool(thinking.is_open(prompts[i])) for i in thinks]
            until = _UntilThought(max(len(prompts[i]) for i in thinks), opened, thinking)
            made = self._complete([prompts[i] for i in thinks], lambda row: wanted(thinks[row]), until)
            for i, was_open, completion in zip(thinks, opened, made, strict=True):
                thoughts[i] = thinking.thought(was_open, completion)
        return thoughts

    def _complete(
        self, prompts: list[list[int]], wanted: Wanted, stops: StoppingCriteria | None = None
    ) -> list[list[int]]:
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
                stopping_criteria=StoppingCriteriaList([_Unwanted(wanted), *([] if stops is None else [stops])]),
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
    eos = _eos_ids(model, tokenizer, path)
    _check_positions(model, section, thinks=Thinking.of(tokenizer, eos) is not None)
    pad = eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # A whole new configuration: the one that comes with a model may sample or penalise repetition.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=section.max_new_tokens, eos_token_id=list(eos), pad_token_id=pad
    )
    # The worker's own tokenizer: the event loop renders prompts meanwhile.
    workers: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    grammars = GrammarTokens(workers, eos, model.config.get_text_config().vocab_size)
    decoder = DraftedDecoder(model, DraftTokens(workers, section.chat_template_options), grammars, pad)
    drafters: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    control_ids(drafters)
    drafts = DraftThread(drafters, section)
    return _Loaded(model, tokenizer, revision, eos, pad, drafts, decoder, Thinking.of(tokenizer, eos))


def _check_positions(model: Any, section: CriticServerSection, *, thinks: bool) -> None:
    positions = model.config.to_dict().get("max_position_embeddings")
    # A thought may be as long as a critique.
    needed = section.max_prompt_tokens + section.max_new_tokens * (1 + thinks)
    if positions is not None and needed > positions:
        twice = ", twice since the model thinks," if thinks else ""
        raise ConfigError(
            f"critic.max_prompt_tokens + critic.max_new_tokens{twice} is {needed}; "
            f"the model has {positions} positions: "
            "lower one of them"
        )


def _eos_ids(model: Any, tokenizer: Any, path: Path) -> tuple[int, ...]:
    """Every id that ends an answer: a chat model's generation configuration may name several."""
    configured = model.generation_config.eos_token_id
    if configured is None:
        configured = tokenizer.eos_token_id
    if configured is None:
        raise ConfigError(f"neither generation_config.json nor the tokenizer in {path} names an EOS token")
    return (configured,) if isinstance(configured, int) else tuple(configured)
