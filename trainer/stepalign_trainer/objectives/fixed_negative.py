"""A fixed negative advantage on tokens that the student itself finds unlikely.

Source: arXiv 2608.31046, which finds it to match self-distillation::

    ℓ_t = −a · π_θ(y_t) / sg(π_θ(y_t))  where π_θ(y_t) < p, else 0        w_t = 1/(tokens of the batch)

with a < 0. There is no teacher and no reward. Deviations:

1. There is one optimizer step on a batch, so the ratio is 1 and nothing is clipped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stepalign_run.config import FixedNegativeSection
from stepalign_run.config.arm import OBJECTIVES
from stepalign_trainer.batch.examples import Example
from stepalign_trainer.objectives.base import Objective, mean_weights
from stepalign_trainer.objectives.divergence import Predictions


class FixedNegative(Objective):
    needs = OBJECTIVES["fixed_negative"]

    def __init__(self, settings: FixedNegativeSection) -> None:
        self.settings = settings

    def weights(self, examples: Sequence[Example]) -> list[torch.Tensor]:
        return mean_weights(examples, "token")

    def token_loss(self, predictions: Predictions, tokens: slice) -> torch.Tensor:
        ratio = (predictions.logprob - predictions.logprob.detach()).exp()
        return -self.settings.advantage * ratio * self.signal(predictions, tokens)

    def signal(self, predictions: Predictions, tokens: slice) -> torch.Tensor:
        return (predictions.logprob.detach().exp() < self.settings.max_probability).float()
