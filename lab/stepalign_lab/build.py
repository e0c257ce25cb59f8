"""Makes the lab's assets from nothing but seeds: ``stepalign lab build``.

Two models (solver, critic), three problem lists, a model card and checksums. The problem lists are the solver's *hard
band*: chains that it solves fewer than 5 times in 16 at T = 1.1. Two gates must pass before anything is written: the
solver must follow a context in its own wording (the self-teacher), and the critic's critiques of the solver's own
rollouts, truncated ones included, must validate and be exactly right.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from stepalign import Critique, validate_critique
from stepalign.errors import StepalignError
from stepalign.prompts import Message, load_prompt, render_token_ids
from stepalign_lab.card import write_card, write_checksums
from stepalign_lab.checker import exact_critique
from stepalign_lab.documents import PROMPTS, Document, critic_document, critique_messages, solver_document
from stepalign_lab.domain import (
    Chain,
    reference_solution,
    sample_chain,
    step_bodies,
    tagged,
    wrong_facts,
)
from stepalign_lab.pretrain import Phase, pretrain, small_llama
from stepalign_lab.tokenizer import MARKS, VERDICTS, Tokenizer, build_tokenizer
from stepalign_run.folder.outputs import prepare_new_folder

TEMPERATURE = 1.1
BAND_SAMPLES, BAND_BELOW = 16, 5
SPLITS = {"train": 500, "validation": 60, "test": 60}
MAX_NEW_TOKENS = 64
MAX_CRITIQUE_TOKENS = 96
HELD_OUT = 400
Log = Callable[[str], None]
GATES = {
    "teacher_right_own_wording": 0.99,
    "teacher_right_reference_wording": 0.99,
    "critiques_valid": 0.98,
    "critiques_exact": 0.98,
    "critiques_exact_truncated": 0.98,
}


class GateError(StepalignError):
    """A model that is not good enough to be shipped."""


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Tokenizer,
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


def select_band(model: LlamaForCausalLM, tokenizer: Tokenizer, seed: int, log: Log) -> tuple[list[Chain], float]:
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


def teacher_accuracy(model: LlamaForCausalLM, tokenizer: Tokenizer, chains: Sequence[Chain], *, own: bool) -> float:
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
    solver: LlamaForCausalLM, tokenizer: Tokenizer, chains: Sequence[Chain], seed: int
) -> list[tuple[Chain, str, bool]]:
    """The solver's own rollouts of chains, every fourth one cut at a random token: (chain, attempt, cut)."""
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
    tokenizer: Tokenizer,
    attempts: Sequence[tuple[Chain, str, bool]],
    log: Log = print,
) -> tuple[float, float, float]:
    """Shares of critiques that validate, that are exactly right, and that are exactly right on truncated attempts."""
    prompts = [critique_messages(chain.question, attempt, reference_solution(chain)) for chain, attempt, _ in attempts]
    texts = generate(critic, tokenizer, prompts, max_new_tokens=MAX_CRITIQUE_TOKENS)
    outcomes: Counter[str] = Counter()
    valid, exact, exact_cut = 0, 0, 0
    for (chain, attempt, cut), text in zip(attempts, texts, strict=True):
        checked = validate_critique(text, attempt, known_answer=str(chain.results()[-1]))
        right = text == exact_critique(chain.question, attempt)
        outcome = checked.verdict if isinstance(checked, Critique) else checked.reason
        outcomes[f"{outcome}{'' if right else ' (not exact)'}"] += 1
        valid += isinstance(checked, Critique)
        exact += right
        exact_cut += right and cut
    log(f"critic: {dict(sorted(outcomes.items()))}")
    return valid / len(attempts), exact / len(attempts), exact_cut / sum(cut for *_, cut in attempts)


def train_solver(seed: int, log: Log) -> LlamaForCausalLM:
    """2,000 steps at 95 % wrong where it is wrong, then 250 at 99.5 %, 48 documents each."""
    tokenizer = build_tokenizer()
    model = small_llama(tokenizer, seed)
    wrong = wrong_facts(seed)
    phases = [(0.95, Phase(steps=2000, learning_rate=2e-3)), (0.995, Phase(steps=250, learning_rate=5e-4))]
    for name, (share, phase) in zip("ab", phases, strict=True):
        log(f"solver: {phase.steps} steps, wrong facts written {share:.1%} of the time")

        def make(rng: random.Random, share: float = share) -> Document:
            return solver_document(rng, wrong, share)

        pretrain(model, tokenizer, make, phase, batch=48, seed=f"solver {seed} {name}", log=log)
    return model


def train_critic(seed: int, log: Log) -> LlamaForCausalLM:
    """Synthetic attempts with their exact critiques, 32 a step, in phases.

    The first phase learns to write the steps: the first 1,000 steps of a schedule of 2,500. The meaning of a mark or
    a verdict, that two words far apart are equal, is not learned then; in the phases after it marks and verdicts weigh
    eight times as much as other words. Weighing them from the start was tried and reached 74.5 % of critiques valid
    after 3,000 steps, against 99 % this way.
    """
    tokenizer = build_tokenizer(critic=True)
    model = small_llama(tokenizer, seed + 1)
    emphasis = dict.fromkeys([*MARKS, *VERDICTS], 8.0)
    phases = [
        Phase(steps=2500, stop_after=1000, learning_rate=2e-3),
        Phase(steps=1500, learning_rate=1.5e-3, emphasis=emphasis),
    ]
    for number, phase in enumerate(phases):
        log(f"critic: phase {number + 1} of {len(phases)}")
        pretrain(model, tokenizer, critic_document, phase, batch=32, seed=f"critic {seed + number}", log=log)
    return model


def measure_gates(solver: LlamaForCausalLM, critic: LlamaForCausalLM, seed: int, log: Log) -> dict[str, float]:
    """The figures that decide whether the models are shipped, on chains of their own."""
    rng = random.Random(f"gates {seed}")
    chains = [sample_chain(rng) for _ in range(HELD_OUT)]
    tokenizer, critic_tokenizer = build_tokenizer(), build_tokenizer(critic=True)
    attempts = held_out_attempts(solver, tokenizer, chains, seed)
    valid, exact, exact_cut = measure_critic(critic, critic_tokenizer, attempts, log)
    return {
        "teacher_right_own_wording": teacher_accuracy(solver, tokenizer, chains, own=True),
        "teacher_right_reference_wording": teacher_accuracy(solver, tokenizer, chains, own=False),
        "critiques_valid": valid,
        "critiques_exact": exact,
        "critiques_exact_truncated": exact_cut,
    }


def check_gates(figures: dict[str, float]) -> None:
    """Raises GateError when a model is not good enough to be shipped."""
    for name, least in GATES.items():
        if figures[name] < least:
            raise GateError(f"{name} is {figures[name]:.3f}, below {least}; nothing was written")


def write_problems(directory: Path, band: Sequence[Chain]) -> None:
    directory.mkdir()
    rest = iter(band)
    for split, count in SPLITS.items():
        rows = [
            {
                "id": f"lab-{split}-{i:03d}",
                "question": chain.question,
                "answer": str(chain.results()[-1]),
                "reference_solution": reference_solution(chain),
            }
            for i, chain in zip(range(count), rest, strict=False)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{split}.jsonl").write_text(text, encoding="utf-8")


def build_assets(target: Path, seed: int, log: Log) -> None:
    """Train both models, pass the gates, select the problems, write everything to ``target``."""
    write_assets(target, train_solver(seed, log), train_critic(seed, log), seed, log)


def write_assets(target: Path, solver: LlamaForCausalLM, critic: LlamaForCausalLM, seed: int, log: Log) -> None:
    """Measure, and write nothing unless the gates are passed (GateError).

    Raises NotOursError when ``target`` is not empty, be it that it was when the models were trained.
    """
    figures = measure_gates(solver, critic, seed, log)
    log(f"gates: {figures}")
    check_gates(figures)
    band, never = select_band(solver, build_tokenizer(), seed, log)
    figures["band_never_solved"] = never
    prepare_new_folder(target)
    for name, model, tokenizer in (
        ("solver", solver, build_tokenizer()),
        ("critic", critic, build_tokenizer(critic=True)),
    ):
        model.save_pretrained(target / name, safe_serialization=True)
        tokenizer.save_pretrained(target / name)
    write_problems(target / "problems", band)
    (target / "gates.json").write_text(json.dumps({"seed": seed, **figures}, indent=1) + "\n", encoding="utf-8")
    write_card(target, figures, seed)
    write_checksums(target)
