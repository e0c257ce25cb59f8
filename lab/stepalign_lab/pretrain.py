"""Pretraining of the lab's two models: a small Llama, loss on the response tokens only."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from stepalign.prompts import render_token_ids
from stepalign.prompts.content_tokens import content_token_ids
from stepalign_lab.documents import Document
from stepalign_lab.tokenizer import Tokenizer

WARM_UP_STEPS = 100


def small_llama(tokenizer: Tokenizer, seed: int) -> LlamaForCausalLM:
    """An untrained Llama of 0.34 M parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def collate(documents: list[Document], tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents → ``input_ids [B, T]`` and ``labels [B, T]`` (−100 on prompts and padding), padded on the right."""
    eos: int = tokenizer.eos_token_id
    pairs = [
        (
            render_token_ids(tokenizer, messages),
            [*content_token_ids(tokenizer, response), eos],
        )
        for messages, response in documents
    ]
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    input_ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
    labels = torch.full((len(pairs), width), -100)
    for row, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt) : end] = torch.tensor(response)
    return input_ids, labels


@dataclass(frozen=True)
class Phase:
    """A training phase with an optimizer of its own: linear warm-up, cosine to a hundredth of the peak rate.

    ``stop_after`` leaves the schedule of ``steps`` early. ``emphasis`` weighs the loss of some words, others weigh 1.
    """

    steps: int
    learning_rate: float
    stop_after: int | None = None
    emphasis: dict[str, float] = field(default_factory=dict)

    def rate(self, step: int) -> float:
        """Share of the peak rate at a step (from 0)."""
        warm_up = min(WARM_UP_STEPS, self.steps // 10)
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (self.steps - warm_up)))


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    make_document: Callable[[random.Random], Document],
    phase: Phase,
    *,
    batch: int,
    seed: str,
    log: Callable[[str], None] = print,
) -> None:
    """Train in place with AdamW, gradients clipped at 1."""
    weights = torch.ones(len(tokenizer))
    for word, weight in phase.emphasis.items():
        weights[tokenizer.convert_tokens_to_ids(word)] = weight
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, phase.rate)
    model.train()
    started = time.monotonic()
    steps = phase.stop_after or phase.steps
    for step in range(1, steps + 1):
        input_ids, labels = collate([make_document(rng) for _ in range(batch)], tokenizer)
        logits = model(input_ids=input_ids).logits[:, :-1].flatten(0, 1)
        loss = cross_entropy(logits, labels[:, 1:].flatten(), weight=weights, ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            log(f"step {step}/{steps} loss {loss.item():.4f} ({time.monotonic() - started:.0f} s)")
    model.eval()
