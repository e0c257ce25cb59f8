"""Configurations that use the tiny solver, and published versions of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from stepalign_run.config import Config, load_config
from stepalign_run.policy_store import Canary, PolicyVersion, file_sha256
from support.tiny_solver import model_path, save_adapter, tokenizer

__all__ = ["model_path", "save_adapter", "tokenizer"]

QUESTIONS = ["3 + 4 * 7", "1 - 2 + 3 * 4", "9 * 9", "5 + 5 - 1 * 8 + 2"]


def write_problems(path: Path, prefix: str, count: int) -> None:
    rows = [{"id": f"{prefix}{i}", "question": question, "answer": "1"} for i, question in enumerate(QUESTIONS[:count])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def make_config(tmp_path: Path, model_path: Path) -> Callable[..., Config]:
    """``make_config("--trainer.steps", "3")``: a small configuration over four training problems."""
    for name, prefix, count in (("train", "t", 4), ("validation", "v", 2), ("test", "s", 2)):
        write_problems(tmp_path / f"{name}.jsonl", prefix, count)
    file = tmp_path / "config.toml"
    file.write_text(
        f"""
        run = {{ name = "unit", dir = "{tmp_path / "runs"}", seed = 3 }}
        model = {{ path = "{model_path}", prompts = "lab-v1", device = "cpu" }}
        data = {{ train = "train.jsonl", validation = "validation.jsonl", test = "test.jsonl" }}
        critic = {{ backend = "program", checker = "lab", prompts = "lab-v1" }}
        queue = {{ capacity = 8 }}
        solver = {{ temperature = 1.1, max_new_tokens = 8, batch = 3 }}
        trainer = {{ steps = 2, batch = 4 }}
        evaluation = {{ samples = 2, every = 1, batch = 3, max_new_tokens = 8 }}
        """.replace("\n        ", "\n"),
        encoding="utf-8",
    )
    return cache(lambda *overrides: load_config(file, overrides, environ={}))


@pytest.fixture
def policy_version(
    tmp_path: Path, model_path: Path, save_adapter: Callable[..., Path]
) -> Callable[[int], PolicyVersion]:
    """A published version with an adapter of its own, and the canary that a trainer would measure: nothing merged."""

    def make(version: int) -> PolicyVersion:
        path = save_adapter(tmp_path / f"adapter-{version}", seed=version)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_path), path)
        prompt, completion = [5, 9, 12], [7, 20, 31, 4]
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([prompt + completion])).logits[0, 2:-1].log_softmax(-1)
        values = logprobs.gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1).tolist()
        return PolicyVersion(
            version=version,
            path=str(path),
            sha256=file_sha256(path / "adapter_model.safetensors"),
            canary=Canary(prompt_token_ids=prompt, completion_token_ids=completion, logprobs=values),
        )

    return make
