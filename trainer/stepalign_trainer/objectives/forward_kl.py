"""Self-distillation: the forward KL of the student to its self-teacher.

Source: Kara and Ersoy, The Role of Feedback Alignment in Self-Distillation, arXiv 2606.11173::

    ℓ_t = KL( π_θ0(·|x, c, y_<t) ‖ π_θ(·|x, y_<t) )        w_t = 1/|M| for tokens in scope, else 0

M holds the tokens in scope of the whole batch, so each counts the same whatever its rollout. Deviations:

1. The scope: under ``through_first_error`` and ``random_step`` tokens behind its end carry no loss.
2. The mean is over the tokens of the batch; the source's formula takes it within each rollout first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from stepalign_run.config.arm import OBJECTIVES
from stepalign_trainer.batch.examples import Example
from stepalign_trainer.objectives.base import Objective
from stepalign_trainer.objectives.divergence import Predictions

SIGNAL_NATS = 0.01
"""A token whose teacher and student are closer than this is pushed nowhere worth mentioning."""


class ForwardKl(Objective):
    needs = OBJECTIVES["forward_kl"]
    floor: ClassVar[float | None] = 0.0

    def weights(self, examples: Sequence[Example]) -> list[torch.Tensor]:
        in_scope = max(sum(example.groups.in_scope for example in examples), 1)
        return [
            (torch.arange(len(example.completion)) < example.groups.in_scope).float() / in_scope for example in examples
        ]

    def token_loss(self, predictions: Predictions, tokens: slice) -> torch.Tensor:
        return predictions.kl

    def signal(self, predictions: Predictions, tokens: slice) -> torch.Tensor:
        return (predictions.kl > SIGNAL_NATS).float()
