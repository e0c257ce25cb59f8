"""Sampling with one random stream per completion, so that a completion does not depend on its batch.

transformers' ``generate`` runs the batch with its KV cache; :class:`SeededSampling` makes the choice. Each completion
draws one uniform number a token from a generator of its own and inverts the distribution at it, so a seed gives the
same completion whatever else is sampled beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stepalign.errors import ConfigError, NonFiniteError
from stepalign.types import FinishReason
from stepalign_models.caches import attends_to_everything, cache_parameter
from stepalign_run.rollout import SamplingParameters

# Prompts with worked examples share hundreds of tokens; a few are not worth a forward pass of their own.
MIN_SHARED_TOKENS = 32


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any parts, the same on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Completion:
    """Token ids (EOS last when the model stopped by itself), their decoding without EOS, and log-probabilities."""

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    logprobs: list[float]


def _shared_length(prompts: Sequence[list[int]]) -> int:
    """Length of the beginning that all prompts share, each keeping a token of its own; 0 where it is not worth it."""
    # Of sorted lists the first and the last share the prefix of all.
    first, last = min(prompts), max(prompts)
    differ = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    shared = min(next(differ, len(last)), min(map(len, prompts)) - 1)
    return shared if shared >= MIN_SHARED_TOKENS and len(prompts) > 1 else 0


def _padded(prompt: list[int], shared: int, width: int, pad_id: int) -> tuple[list[int], list[int]]:
    """Token ids and attention mask ``[width]``; the padding stands after the first ``shared`` tokens."""
    gap = width - len(prompt)
    ids = prompt[:shared] + [pad_id] * gap + prompt[shared:]
    return ids, [1] * shared + [0] * gap + [1] * (len(prompt) - shared)


class SeededSampling(LogitsProcessor):
    """Temperature, top-k, top-p, then the choice: all scores but the chosen token's become −∞.

    ``uniforms [B, T]`` are the random numbers, ``logprobs`` gathers the chosen tokens' natural-log probabilities
    under the filtered distribution.
    """

    def __init__(self, parameters: SamplingParameters, uniforms: torch.Tensor) -> None:
        self.parameters = parameters
        self.uniforms = uniforms
        self.logprobs: list[torch.Tensor] = []
        self.warpers: Any = LogitsProcessorList()
        if parameters.top_k:
            self.warpers.append(TopKLogitsWarper(parameters.top_k))
        if parameters.top_p < 1:
            self.warpers.append(TopPLogitsWarper(parameters.top_p))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = self.warpers(input_ids, scores.float() / self.parameters.temperature)
        probabilities = scores.softmax(-1).cpu().double()
        if not torch.isfinite(probabilities).all():
            raise NonFiniteError(
                "the policy's probabilities are not finite: its weights have diverged, or model.dtype is too narrow; "
                "start a run with a lower trainer.learning_rate or another model.dtype"
            )
        cumulative = probabilities.cumsum(-1)
        drawn = self.uniforms[:, len(self.logprobs)].unsqueeze(-1) * cumulative[:, -1:]
        # right=True: a zero-probability token has the same cumulative value as its predecessor and is never chosen.
        chosen = torch.searchsorted(cumulative, drawn, right=True).clamp(max=scores.shape[-1] - 1)
        self.logprobs.append(probabilities.gather(-1, chosen).log().squeeze(-1))
        chosen = chosen.to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)


class Sampler:
    """Samples completions of prompts from one model as it stands: the caller switches adapters on or off."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any) -> None:
        """Raises ConfigError for a model without an end of sequence."""
        self.model: Any = model
        self.tokenizer = tokenizer
        self.device: torch.device = self.model.device
        eos = self.model.generation_config.eos_token_id
        if eos is None:
            raise ConfigError("the solver model names no end of sequence: set eos_token_id in generation_config.json")
        self.eos_ids: list[int] = [eos] if isinstance(eos, int) else list(eos)
        pad = tokenizer.pad_token_id
        self.pad_id: int = pad if pad is not None else self.eos_ids[0]
        self._generation = GenerationConfig(eos_token_id=self.eos_ids, pad_token_id=self.pad_id)

    @torch.inference_mode()
    def sample(self, prompts: Sequence[list[int]], parameters: Sequence[SamplingParameters]) -> list[Completion]:
        """One completion per prompt. The parameters may differ in their seed only (ValueError otherwise)."""
        shared = {p.model_copy(update={"seed": 0}).model_dump_json() for p in parameters}
        if len(shared) != 1 or len(prompts) != len(parameters):
            raise ValueError("a batch needs one set of sampling parameters per prompt, equal but for the seed")
        budget = parameters[0].max_new_tokens
        generators = [torch.Generator().manual_seed(p.seed) for p in parameters]
        uniforms = torch.stack([torch.rand(budget, generator=g, dtype=torch.float64) for g in generators])
        choice = SeededSampling(parameters[0], uniforms)
        width = max(map(len, prompts))
        shared_length = _shared_length(prompts) if attends_to_everything(self.model.config) else 0
        padded = [_padded(prompt, shared_length, width, self.pad_id) for prompt in prompts]
        with self._nothing_but_our_choice():
            output = self.model.generate(
                input_ids=torch.tensor([ids for ids, _ in padded], device=self.device),
                attention_mask=torch.tensor([mask for _, mask in padded], device=self.device),
                do_sample=False,
                max_new_tokens=budget,
                logits_processor=LogitsProcessorList([choice]),
                **self._cache_of(prompts[0][:shared_length], len(prompts)),
            )
        rows: list[list[int]] = output[:, width:].tolist()
        logprobs: list[list[float]] = torch.stack(choice.logprobs, dim=-1).tolist()
        return [self._cut(row, values) for row, values in zip(rows, logprobs, strict=True)]

    @torch.inference_mode()
    def logprobs(self, prompt: list[int], completion: list[int]) -> list[float]:
        """Log-probabilities ``[T]`` of a completion's tokens, in nats: T = 1, no filters."""
        logits = self.model(input_ids=torch.tensor([prompt + completion], device=self.device)).logits
        predicted = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        return predicted.gather(-1, torch.tensor(completion, device=self.device).unsqueeze(-1)).squeeze(-1).tolist()

    @contextmanager
    def _nothing_but_our_choice(self) -> Iterator[None]:
        """The model's own configuration may hold penalties and filters that the loss knows nothing of, and generate()
        fills arguments that a call leaves unset from it. The model has it back afterwards."""
        of_the_model = self.model.generation_config
        self.model.generation_config = self._generation
        try:
            yield
        finally:
            self.model.generation_config = of_the_model

    def _cache_of(self, shared: list[int], batch: int) -> dict[str, Any]:
        """Keys and values of the tokens that all prompts begin with, computed once."""
        if not shared:
            return {}
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        name = cache_parameter(base)
        cache = DynamicCache(config=self.model.config)
        self.model(input_ids=torch.tensor([shared], device=self.device), use_cache=True, **{name: cache})
        cache.batch_repeat_interleave(batch)
        return {name: cache}

    def _cut(self, token_ids: list[int], logprobs: list[float]) -> Completion:
        """Cut after the first EOS. Lengths come from its position, never from comparing with the padding token."""
        stop = next((i for i, token in enumerate(token_ids) if token in self.eos_ids), None)
        length = len(token_ids) if stop is None else stop + 1
        content = token_ids[: length if stop is None else stop]
        return Completion(
            token_ids=token_ids[:length],
            text=self.tokenizer.decode(content, skip_special_tokens=False, clean_up_tokenization_spaces=False),
            finish_reason=FinishReason.LENGTH if stop is None else FinishReason.STOP,
            logprobs=logprobs[:length],
        )
