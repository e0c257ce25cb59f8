"""Makes the lab's assets from nothing but seeds: ``stepalign lab build``.

Two models (solver, critic), three problem lists, a model card and checksums. The problem lists are the solver's *hard
band*: chains that it solves fewer than 5 times in 16 at T = 1.1. Two gates must pass before anything is written: the
solver must follow a context in its own wording (the self-teacher), and the critic's critiques of the solver's own
rollouts, truncated ones included, must validate and be exactly right.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from stepalign import FinishReason, validate_critique
from stepalign.errors import StepalignError
from stepalign.prompts import Message, load_prompt, render_token_ids
from stepalign_lab.checker import exact_critique
from stepalign_lab.documents import PROMPTS, critic_document, critique_messages, solver_document
from stepalign_lab.domain import Chain, parse_question, reference_solution, sample_chain, step_bodies, tagged, wrong_facts
from stepalign_lab.pretrain import pretrain, small_llama
from stepalign_lab.tokenizer import build_tokenizer

TEMPERATURE = 1.1
BAND_SAMPLES, BAND_BELOW = 16, 5
SPLITS = {"train": 500, "validation": 60, "test": 60}
MAX_NEW_TOKENS = 64
HELD_OUT = 400
Log = Callable[[str], None]


class GateError(StepalignError):
    """A model that is not good enough to be shipped."""


@dataclass(frozen=True)
class Gates:
    """Measured before shipping. Shares between 0 and 1."""

    teacher_own_wording: float
    teacher_reference_wording: float
    critic_exact_on_base_rollouts: float
    critic_valid_on_base_rollouts: float
    critic_exact_on_truncated: float
    never_solved_share_of_band: float


@torch.inference_mode()
def generate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[Message]],
    *,
    temperature: float = 0.0,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """Decoded completions, EOS left out; greedy at temperature 0."""
    rows = [render_token_ids(tokenizer, messages) for messages in prompts]
    width = max(map(len, rows))
    pad: int = tokenizer.pad_token_id
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    output = model.generate(
        input_ids=torch.tensor([[pad] * (width - len(row)) + row for row in rows]),
        attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        max_new_tokens=max_new_tokens,
        **sampling,
    )
    eos: int = tokenizer.eos_token_id
    completions = [row[: row.index(eos)] if eos in row else row for row in output[:, width:].tolist()]
    return [tokenizer.decode(row) for row in completions]


def _student(chain: Chain) -> list[Message]:
    return load_prompt(PROMPTS, "student").fill(question=chain.question)


def select_band(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, log: Log
) -> tuple[list[Chain], float]:
    """Chains of the hard band in the order they were found, and the share of them that is never solved."""
    rng = random.Random(f"band {seed}")
    torch.manual_seed(seed)
    wanted = sum(SPLITS.values())
    band: dict[str, Chain] = {}
    never = 0
    seen: set[str] = set()
    while len(band) < wanted:
        chains = [sample_chain(rng) for _ in range(64)]
        prompts = [_student(chain) for chain in chains for _ in range(BAND_SAMPLES)]
        texts = generate(model, tokenizer, prompts, temperature=TEMPERATURE)
        for i, chain in enumerate(chains):
            ending = f"<answer> {chain.results()[-1]} </answer>"
            solved = sum(text.endswith(ending) for text in texts[i * BAND_SAMPLES : (i + 1) * BAND_SAMPLES])
            if chain.question not in seen and solved < BAND_BELOW and len(band) < wanted:
                band[chain.question] = chain
                never += solved == 0
            seen.add(chain.question)
        log(f"band: {len(band)} of {wanted} after {len(seen)} chains")
    return list(band.values()), never / wanted


def teacher_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, chains: Sequence[Chain], *, own: bool
) -> float:
    """Share of chains that the solver answers rightly, greedily, with the right solution as its context."""
    prompts = []
    for chain in chains:
        name = "teacher_critique" if own else "teacher_reference"
        results = chain.results()
        trace = tagged(step_bodies(chain, results, "own"), results[-1])
        context = trace if own else reference_solution(chain)
        prompts.append(load_prompt(PROMPTS, name).fill(question=chain.question, context=context))
    texts = generate(model, tokenizer, prompts)
    right = sum(
        text.endswith(f"<answer> {chain.results()[-1]} </answer>") for text, chain in zip(texts, chains, strict=True)
    )
    return right / len(chains)


def held_out_attempts(
    solver: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, chains: Sequence[Chain], seed: int
) -> list[tuple[Chain, str, bool]]:
    """The solver's own rollouts of chains, every fourth one truncated at a random token: (chain, attempt, truncated)."""
    torch.manual_seed(seed)
    rng = random.Random(f"held out {seed}")
    texts = generate(solver, tokenizer, [_student(chain) for chain in chains], temperature=TEMPERATURE)
    attempts = []
    for i, (chain, text) in enumerate(zip(chains, texts, strict=True)):
        words = text.split()
        cut = i % 4 == 3 and len(words) > 1
        attempts.append((chain, " ".join(words[: rng.randrange(1, len(words))]) if cut else text, cut))
    return attempts


def measure_critic(
    critic: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    attempts: Sequence[tuple[Chain, str, bool]],
    log: Log = print,
) -> tuple[float, float, float]:
    """Shares of critiques that are exactly right, that validate, and that are exactly right on truncated attempts."""
    prompts = [critique_messages(chain.question, attempt, reference_solution(chain)) for chain, attempt, _ in attempts]
    texts = generate(critic, tokenizer, prompts, max_new_tokens=96)
    outcomes: Counter[str] = Counter()
    exact, valid, exact_cut = 0, 0, 0
    for (chain, attempt, cut), text in zip(attempts, texts, strict=True):
        right = text == exact_critique(chain.question, attempt)
        checked = validate_critique(
            text, attempt, known_answer=str(chain.results()[-1]), critic_finish_reason=FinishReason.STOP
        )
        outcome = getattr(checked, "verdict", None) or getattr(checked, "reason", None)
        outcomes[f"{outcome}{'' if right else ' (not exact)'}"] += 1
        exact += right
        valid += hasattr(checked, "verdict")
        exact_cut += right and cut
    log(f"critic outcomes: {dict(outcomes)}")
    return exact / len(attempts), valid / len(attempts), exact_cut / sum(cut for *_, cut in attempts)
