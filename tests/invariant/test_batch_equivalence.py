"""Equivalence classes of training: how a batch is split must not show in what is learned."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from stepalign.critique.alignment import validate_critique
from stepalign.prompts import load_prompt, render_token_ids
from stepalign.types import Critique, Problem
from stepalign_lab.checker import exact_critique
from stepalign_lab.domain import parse_question, step_bodies, tagged, wrong_facts
from stepalign_run.config import Config, load_config
from stepalign_run.context import Context, ContextKind
from stepalign_run.rollout import Rollout
from stepalign_trainer.batch.examples import Example, ModelLimits, build_example
from stepalign_trainer.update.learner import Learner
from support.numeric import assert_close_to_norm

pytestmark = [pytest.mark.slow, pytest.mark.numeric]

QUESTIONS = [
    "4 - 5 * 1 - 3 * 4 - 9",
    "2 * 7 * 2 + 3 * 8 * 8",
    "9 * 0 * 8 * 0 - 0",
    "7 * 0 + 4 - 6 - 1",
    "3 + 4 * 7 - 2 + 1",
    "6 * 6 - 1 + 8",
    "5 + 5 - 9 * 3 * 2 + 7",
    "1 - 8 * 8 + 3 - 6",
]
UPDATES = 3


@pytest.fixture(scope="module")
def model_path() -> Path:
    return Path(str(files("stepalign_lab") / "assets" / "solver"))


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_path)


def configuration(folder: Path, model_path: Path, *overrides: str) -> Config:
    file = folder / "config.toml"
    file.write_text(
        f"""
        run = {{ name = "unit", dir = "{folder / "runs"}" }}
        model = {{ path = "{model_path}", prompts = "lab-v1", device = "cpu" }}
        data = {{ train = "train.jsonl" }}
        critic = {{ backend = "program", checker = "lab", prompts = "lab-v1" }}
        solver = {{ max_prompt_tokens = 64, max_new_tokens = 64 }}
        trainer.max_teacher_prompt_tokens = 192
        trainer.batch = 8
        trainer.learning_rate = 1e-3
        trainer.lora = {{ rank = 4, alpha = 8 }}
        """.replace("\n        ", "\n"),
        encoding="utf-8",
    )
    return load_config(file, overrides, environ={})


def example(config: Config, tokenizer: Any, question: str, cut: bool) -> Example:
    """The attempt that the lab's solver makes: wrong wherever it has learned a wrong fact; cut off or ended by EOS."""
    chain = parse_question(question)
    table = {(a, op, b): r for a in range(10) for op in "+-*" for b in range(10) for r in [0]}
    table |= {fact: parse_question(f"{fact[0]} {fact[1]} {fact[2]}").results()[0] for fact in table}
    results = chain.results(table | wrong_facts(0))
    words = tagged(step_bodies(chain, results, "own"), results[-1]).split()
    text = " ".join(words[:17] if cut else words)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = str(chain.results()[-1])
    rollout = Rollout.model_validate(
        {
            "run_id": "unit",
            "rollout_id": "r",
            "group_id": "g",
            "problem": Problem(id="p", question=question, answer=answer),
            "policy_version": 0,
            "prompt_token_ids": render_token_ids(tokenizer, load_prompt("lab-v1", "student").fill(question=question)),
            "completion_token_ids": ids if cut else [*ids, tokenizer.eos_token_id],
            "text": text,
            "finish_reason": "length" if cut else "stop",
            "sampling": {"max_new_tokens": 64, "seed": 0},
        }
    )
    critique = validate_critique(exact_critique(question, text), text, known_answer=answer)
    assert isinstance(critique, Critique)
    context = Context(kind=ContextKind.CRITIQUE, text=critique.text)
    return build_example(config, tokenizer, ModelLimits(52, None), rollout, context, critique)


def trajectory(
    folder: Path, model_path: Path, tokenizer: Any, overrides: Sequence[str], *, reverse: bool = False
) -> tuple[list[float], torch.Tensor]:
    """Losses of some updates, and all adapter weights after them."""
    config = configuration(folder, model_path, *overrides)
    batch = [example(config, tokenizer, question, cut=i % 4 == 3) for i, question in enumerate(QUESTIONS)]
    learner = Learner(config, tokenizer)
    losses = [learner.update(batch[::-1] if reverse else batch).loss for _ in range(UPDATES)]
    return losses, torch.cat([p.detach().flatten() for p in learner.parameters])


def test_one_by_eight_is_two_by_four_is_eight_by_one(tmp_path: Path, model_path: Path, tokenizer: Any) -> None:
    whole, weights = trajectory(tmp_path, model_path, tokenizer, ["--trainer.micro_batch", "8"])
    assert whole[0] > 1e-3 and whole[-1] < 0.95 * whole[0]
    for size in ("4", "1"):
        losses, others = trajectory(tmp_path, model_path, tokenizer, ["--trainer.micro_batch", size])
        assert losses[0] == pytest.approx(whole[0], rel=1e-5)
        assert losses == pytest.approx(whole, rel=1e-3)
        # AdamW's first steps are signs: rounding decides that of a gradient near 0, and moves its weight a whole step.
        assert_close_to_norm([others], [weights], 0.02)


def test_neither_order_nor_logit_chunks_show(tmp_path: Path, model_path: Path, tokenizer: Any) -> None:
    whole, _ = trajectory(tmp_path, model_path, tokenizer, [])
    chunked, _ = trajectory(tmp_path, model_path, tokenizer, ["--trainer.logit_chunk", "7"], reverse=True)
    assert chunked[0] == pytest.approx(whole[0], rel=1e-5)
    assert chunked == pytest.approx(whole, rel=1e-3)


def test_the_same_configuration_gives_the_same_bits(tmp_path: Path, model_path: Path, tokenizer: Any) -> None:
    first, weights = trajectory(tmp_path, model_path, tokenizer, ["--trainer.micro_batch", "4"])
    second, others = trajectory(tmp_path, model_path, tokenizer, ["--trainer.micro_batch", "4"])
    assert first == second and torch.equal(weights, others)
