"""Self-distillation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stepalign_trainer.batch.examples import Example
from stepalign_trainer.objectives.base import SIGNAL_NATS
from stepalign_trainer.objectives.divergence import Predictions


class ForwardKl:
    """Self-distillation: the mean over the tokens in scope, each counting the same whatever its rollout."""

    iterations = 1
    floor: float | None = 0.0

    def weights(self, examples: Sequence[Example]) -> list[torch.Tensor]:
        in_scope = max(sum(example.groups.in_scope for example in examples), 1)
        return [
            (torch.arange(len(example.completion)) < example.groups.in_scope).float() / in_scope for example in examples
        ]

    def begin(self, examples: Sequence[Example], old_logprobs: torch.Tensor | None) -> None:
        return

    def token_loss(self, predictions: Predictions, tokens: slice) -> torch.Tensor:
        return predictions.kl

    def signal(self, predictions: Predictions, tokens: slice) -> torch.Tensor:
        return (predictions.kl > SIGNAL_NATS).float()
