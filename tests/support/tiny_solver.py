"""Fixtures: a tiny random Llama, its tokenizer, and adapters for it. A conftest.py imports those that it offers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from stepalign_lab.pretrain import small_llama
from stepalign_lab.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """An untrained model with its weights scaled up, so that its next-token distribution is far from uniform."""
    path: Path = tmp_path_factory.mktemp("model")
    model = small_llama(tokenizer, seed=1)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
        model.get_input_embeddings().weight.mul_(3.0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def save_adapter(model_path: Path) -> Callable[..., Path]:
    """Write a LoRA adapter with random weights; ``scale=0`` leaves the model as it is."""

    def save(directory: Path, *, seed: int = 0, scale: float = 0.1) -> Path:
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(model_path)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_().mul_(scale)
        model.save_pretrained(str(directory))
        return directory

    return save
