"""A fixed negative advantage."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stepalign_run.config import FixedNegativeSection
from stepalign_trainer.batch.examples import Example
from stepalign_trainer.objectives.base import _mean_weights
from stepalign_trainer.objectives.divergence import Predictions


class FixedNegative:
    """Pushes down what the student itself finds unlikely. There is no teacher and no reward."""

    iterations = 1
    floor: float | None = None

    def __init__(self, settings: FixedNegativeSection) -> None:
        self.settings = settings

    def weights(self, examples: Sequence[Example]) -> list[torch.Tensor]:
        return _mean_weights(examples, "token")

    def begin(self, examples: Sequence[Example], old_logprobs: torch.Tensor | None) -> None:
        return

    def token_loss(self, predictions: Predictions, tokens: slice) -> torch.Tensor:
        ratio = (predictions.logprob - predictions.logprob.detach()).exp()
        return -self.settings.advantage * ratio * self.signal(predictions, tokens)

    def signal(self, predictions: Predictions, tokens: slice) -> torch.Tensor:
        return (predictions.logprob.detach().exp() < self.settings.max_probability).float()
