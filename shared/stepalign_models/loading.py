"""Loading the policy: a base model from a folder, alone or with a PEFT adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepalign.errors import ConfigError
from stepalign_models.devices import choose_device
from stepalign_run.config import ModelSection


def resolve_device(name: str) -> torch.device:
    """The torch device of a configured name."""
    return torch.device(
        choose_device(
            name, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), xpu=torch.xpu.is_available()
        )
    )


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of ``model.path``. Raises ConfigError where there is no model."""
    _require_model(path)
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def load_policy(settings: ModelSection, adapter: Path | None, *, merge: bool) -> torch.nn.Module:
    """The policy in evaluation mode. The base is read anew each time: merging and unmerging would drift.

    Raises ConfigError where there is no model.
    """
    _require_model(settings.path)
    model: Any = AutoModelForCausalLM.from_pretrained(
        settings.path, dtype=getattr(torch, settings.dtype.value), local_files_only=True, use_safetensors=True
    )
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
        if merge:
            model = model.merge_and_unload()
    return model.to(resolve_device(settings.device)).eval()


def _require_model(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ConfigError(f"model.path {path}: there is no model there (config.json is missing)")
