"""The lab's solver as the model, attempts at one chain, their exact critiques, and learners."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from stepalign.alignment import validate_critique
from stepalign.config import Config, load_config
from stepalign.types import Context, ContextKind, Critique, Problem, Rollout
from stepalign_lab.checker import exact_critique
from stepalign_trainer.examples import Example, build_example
from stepalign_trainer.learner import Learner

# 3 + 4 = 7, 7 * 7 = 9, 9 - 2 = 7, 7 + 1 = 8
QUESTION = "3 + 4 * 7 - 2 + 1"
REFERENCE = "7 is 4 + of 3 ; 9 is 7 * of 7 ; 7 is 2 - of 9 ; 8 is 1 + of 7 ; so 8"
ATTEMPTS = {
    "right": (
        "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 9 </step_2> <step_3> 9 - 2 = 7 </step_3> "
        "<step_4> 7 + 1 = 8 </step_4> <answer> 8 </answer>"
    ),
    "wrong_step": (
        "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 8 </step_2> <step_3> 8 - 2 = 6 </step_3> "
        "<step_4> 6 + 1 = 7 </step_4> <answer> 7 </answer>"
    ),
    "wrong_answer": (
        "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 9 </step_2> <step_3> 9 - 2 = 7 </step_3> "
        "<step_4> 7 + 1 = 8 </step_4> <answer> 5 </answer>"
    ),
    "missing_step": (
        "<step_1> 3 + 4 = 7 </step_1> <step_2> 9 - 2 = 7 </step_2> <step_3> 7 + 1 = 8 </step_3> <answer> 8 </answer>"
    ),
    "missing_last": (
        "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 9 </step_2> <step_3> 9 - 2 = 7 </step_3> <answer> 8 </answer>"
    ),
    "unfinished": "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 *",
    "unfinished_wrong": "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 +",
}


@pytest.fixture(scope="session")
def model_path() -> Path:
    return Path(str(files("stepalign_lab") / "assets" / "solver"))


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_path)


@pytest.fixture
def make_config(tmp_path: Path, model_path: Path) -> Callable[..., Config]:
    """``make_config("--trainer.steps", "3")``: the lab's regime with batches of four."""
    (tmp_path / "train.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n', encoding="utf-8")
    file = tmp_path / "config.toml"
    file.write_text(
        f"""
        run = {{ name = "unit", dir = "{tmp_path / "runs"}" }}
        model = {{ path = "{model_path}", prompts = "lab-v1", device = "cpu" }}
        data = {{ train = "train.jsonl" }}
        critic = {{ backend = "program", checker = "lab", prompts = "lab-v1" }}
        queue = {{ capacity = 16 }}
        solver = {{ max_prompt_tokens = 64, max_new_tokens = 64 }}
        trainer.max_teacher_prompt_tokens = 192
        trainer.steps = 2
        trainer.batch = 4
        trainer.learning_rate = 1e-3
        trainer.lora = {{ rank = 4, alpha = 8 }}
        """.replace("\n        ", "\n"),
        encoding="utf-8",
    )
    return cache(lambda *overrides: load_config(file, overrides, environ={}))


@pytest.fixture
def rollout_of(tokenizer: Any, make_rollout: Callable[..., Rollout]) -> Callable[..., Rollout]:
    """An attempt, by its name or its text, as a rollout; ``length`` cuts it off instead of ending it by EOS."""

    def make(attempt: str, finish: str = "stop", **overrides: Any) -> Rollout:
        text = ATTEMPTS.get(attempt, attempt)
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        prompt = tokenizer(f"<bos><user>question : {QUESTION}<assistant>", add_special_tokens=False)["input_ids"]
        fields: dict[str, Any] = {
            "problem": Problem(id="p0", question=QUESTION, answer="8", reference_solution=REFERENCE),
            "prompt_token_ids": prompt,
            "completion_token_ids": [*ids, tokenizer.eos_token_id] if finish == "stop" else ids,
            "text": text,
            "finish_reason": finish,
            "behaviour_logprobs": None,
        }
        return make_rollout(**(fields | overrides))

    return make


@pytest.fixture(scope="session")
def critique_of() -> Callable[[Rollout], Critique]:
    """The exact critique, validated."""

    def make(rollout: Rollout) -> Critique:
        text = exact_critique(rollout.problem.question, rollout.text)
        critique = validate_critique(text, rollout.text, known_answer=rollout.problem.answer)
        assert isinstance(critique, Critique), critique
        return critique

    return make


@pytest.fixture
def example_of(
    make_config: Callable[..., Config],
    tokenizer: Any,
    rollout_of: Callable[..., Rollout],
    critique_of: Callable[[Rollout], Critique],
) -> Callable[..., Example]:
    """An attempt with its critique as the teacher's context."""

    def make(attempt: str, finish: str = "stop", arm: str = "stepalign_scoped") -> Example:
        rollout = rollout_of(attempt, finish)
        critique = critique_of(rollout)
        context = Context(kind=ContextKind.CRITIQUE, text=critique.text)
        return build_example(make_config("--run.arm", arm), tokenizer, rollout, context, critique)

    return make


@pytest.fixture
def examples(example_of: Callable[..., Example]) -> list[Example]:
    """Five examples of different lengths and scopes."""
    names = ["wrong_step", "right", "missing_step", "wrong_answer"]
    return [*map(example_of, names), example_of("unfinished", "length")]


@pytest.fixture
def make_learner(make_config: Callable[..., Config], tokenizer: Any) -> Callable[..., Learner]:
    """A fresh learner; ``stirred=True`` gives its adapter random weights, as after many updates."""

    def make(*overrides: str, stirred: bool = False) -> Learner:
        learner = Learner(make_config(*overrides), tokenizer)
        if stirred:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in learner.parameters:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)
        return learner

    return make
