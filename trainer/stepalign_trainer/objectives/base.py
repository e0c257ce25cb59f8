"""Objectives: per-token losses, and the weight of each token in the batch.

The loss of a batch is ``Σ_t w_t · ℓ_t``. Weights are known before the first micro-batch, so the loss does not depend on
how the batch is split. No logits are divided by the sampling temperature. Every objective is one module of this folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from stepalign.critique.answers import Grader
from stepalign_run.config.arm import Needs
from stepalign_run.rollout import Rollout
from stepalign_trainer.batch.examples import Example
from stepalign_trainer.objectives.divergence import Predictions, TokenTerms
from stepalign_trainer.objectives.rewards import Rewards


class Objective(ABC):
    """An arm's objective; one object serves all updates of a run. What it does not define has no part in it."""

    needs: ClassVar[Needs]
    iterations: int = 1
    """Optimizer steps on one batch."""
    floor: ClassVar[float | None] = None
    """The lower bound of every batch's loss, None where there is none. At it there is nothing to learn."""

    def reward(self, rollout: Rollout, grader: Grader) -> float | None:
        """The reward of one rollout, for an objective that needs rewards; None where the grader fails."""
        return None

    def rewards(self, rollouts: Sequence[Rollout], grader: Grader) -> Rewards:
        """The rewards of a batch, for an objective that needs them. A rollout without an advantage is skipped."""
        return Rewards()

    @abstractmethod
    def weights(self, examples: Sequence[Example]) -> list[torch.Tensor]:
        """The weight of each token of each example, ``[T_i]``, together 1; all zero for an empty batch."""

    def begin(self, examples: Sequence[Example], old_logprobs: torch.Tensor | None) -> None:
        """Take a micro-batch.

        ``old_logprobs [T]`` are those before the first optimizer step: None in that step, and where none are needed.
        """
        return

    @abstractmethod
    def token_loss(self, predictions: Predictions, tokens: slice) -> torch.Tensor:
        """Losses ``[T]`` of the micro-batch's ``tokens``."""

    @abstractmethod
    def signal(self, predictions: Predictions, tokens: slice) -> torch.Tensor:
        """Which of the ``tokens`` are pushed somewhere, ``[T]`` of 0 and 1."""

    def columns(
        self, examples: Sequence[Example], first: Sequence[TokenTerms], last: Sequence[TokenTerms]
    ) -> Mapping[str, float]:
        """Its own figures of an update: from each example's values in the first and in the last optimizer step."""
        return {}


def mean_weights(examples: Sequence[Example], normalisation: str) -> list[torch.Tensor]:
    """``token``: 1/(tokens of the batch). ``sequence``: 1/(rollouts · tokens of the rollout)."""
    total = sum(len(example.completion) for example in examples)
    sizes = [len(example.completion) for example in examples]
    return [torch.full((n,), 1 / (total if normalisation == "token" else len(examples) * n)) for n in sizes]
