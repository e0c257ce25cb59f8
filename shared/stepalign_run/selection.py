"""Which checkpoints are evaluated, and which of them is picked: on validation, never on test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepalign_run.config import Config


def evaluated_steps(config: Config) -> list[int]:
    """Steps whose checkpoints are evaluated: the base, every ``evaluation.every`` steps, and the last."""
    every, last = config.evaluation.every, config.trainer.steps
    return sorted({0, *range(every, last + 1, every), last})


def select_step(validation: Mapping[int, Mapping[str, Any]], key: str) -> int:
    """The checkpoint with the best validation figure, the earliest of equals. The base (step 0) is a candidate."""
    return max(sorted(validation), key=lambda step: validation[step][key])
