"""Completions of the base model for the probe, with one random stream per completion.

transformers' ``generate`` runs the batch; :class:`Choice` draws the tokens: softmax of ``logits / T`` after top-k and
top-p, then the inverse of the cumulative distribution at one uniform number a token. A seed gives the same completion
whatever stands beside it in the batch, up to rounding.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from stepalign.errors import ConfigError
from stepalign.types import FinishReason
from stepalign_run.config import SamplingSection


@dataclass(frozen=True)
class Completion:
    """Token ids (EOS last when the model stopped by itself) and their decoding without EOS."""

    token_ids: list[int]
    text: str
    finish_reason: FinishReason


class Choice(LogitsProcessor):
    """All scores ``[B, V]`` but the chosen token's become −∞. ``uniforms [B, T]`` are the random numbers."""

    def __init__(self, settings: SamplingSection, uniforms: torch.Tensor) -> None:
        self.temperature = settings.temperature
        self.uniforms = uniforms
        self.drawn = 0
        self.filters: Any = LogitsProcessorList()
        if settings.top_k:
            self.filters.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self.filters.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        filtered = self.filters(input_ids, scores.float() / self.temperature)
        cumulative = filtered.softmax(-1).cpu().double().cumsum(-1)
        at = self.uniforms[:, self.drawn].unsqueeze(-1) * cumulative[:, -1:]
        self.drawn += 1
        # right=True: a token of probability 0 has its predecessor's cumulative value and is never chosen.
        chosen = torch.searchsorted(cumulative, at, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen.to(scores.device), 0.0)


class Generator:
    """Samples from a causal language model as it stands: whoever calls switches adapters on or off."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Raises ConfigError for a model without an end of sequence."""
        self.model = model
        self.tokenizer = tokenizer
        eos = model.generation_config.eos_token_id
        if eos is None:
            raise ConfigError("the solver model names no end of sequence: set eos_token_id in generation_config.json")
        self.eos_ids: list[int] = [eos] if isinstance(eos, int) else list(eos)
        pad = tokenizer.pad_token_id
        self.pad_id: int = pad if pad is not None else self.eos_ids[0]
        # The model's own may hold penalties and filters, and generate() fills what a call leaves unset from it.
        model.generation_config = GenerationConfig(eos_token_id=self.eos_ids, pad_token_id=self.pad_id)

    def sample(
        self, prompts: Sequence[list[int]], seeds: Sequence[str], settings: SamplingSection, batch: int
    ) -> list[Completion]:
        """One completion per prompt; ``seeds`` are texts that name the random streams. ``batch`` at a time."""
        completions: list[Completion] = []
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            completions += self._sample(prompts[part], seeds[part], settings)
        return completions

    @torch.inference_mode()
    def _sample(
        self, prompts: Sequence[list[int]], seeds: Sequence[str], settings: SamplingSection
    ) -> list[Completion]:
        budget = settings.max_new_tokens
        streams = [torch.Generator().manual_seed(random.Random(seed).getrandbits(63)) for seed in seeds]
        uniforms = torch.stack([torch.rand(budget, generator=stream, dtype=torch.float64) for stream in streams])
        width = max(map(len, prompts))
        rows = [[self.pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        output = self.model.generate(
            input_ids=torch.tensor(rows, device=self.model.device),
            attention_mask=torch.tensor(mask, device=self.model.device),
            do_sample=False,
            max_new_tokens=budget,
            logits_processor=LogitsProcessorList([Choice(settings, uniforms)]),
        )
        return [self._cut(row) for row in output[:, width:].tolist()]

    def _cut(self, token_ids: list[int]) -> Completion:
        """Cut after the first EOS, never at a padding token: the two may be the same."""
        stop = next((i for i, token in enumerate(token_ids) if token in self.eos_ids), None)
        content = token_ids[:stop]
        return Completion(
            token_ids=token_ids if stop is None else token_ids[: stop + 1],
            text=self.tokenizer.decode(content, skip_special_tokens=False, clean_up_tokenization_spaces=False),
            finish_reason=FinishReason.LENGTH if stop is None else FinishReason.STOP,
        )
