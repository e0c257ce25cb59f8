"""Group-relative policy optimisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stepalign_run.config import GrpoSection
from stepalign_trainer.batch.examples import Example
from stepalign_trainer.objectives.base import _mean_weights
from stepalign_trainer.objectives.divergence import Predictions, reverse_kl


class Grpo:
    """Group-relative policy optimisation with its guards."""

    floor: float | None = None

    def __init__(self, settings: GrpoSection) -> None:
        self.settings = settings
        self.iterations = settings.num_iterations
        self._low = 1 - settings.epsilon
        self._high = 1 + (settings.epsilon if settings.epsilon_high is None else settings.epsilon_high)
        self._advantages = torch.empty(0)
        self._old: torch.Tensor | None = None

    def weights(self, examples: Sequence[Example]) -> list[torch.Tensor]:
        return _mean_weights(examples, self.settings.normalisation)

    def begin(self, examples: Sequence[Example], old_logprobs: torch.Tensor | None) -> None:
        values = [torch.full((len(e.completion),), float(e.advantage or 0.0)) for e in examples]
        self._advantages = torch.cat(values)
        self._old = old_logprobs

    def token_loss(self, predictions: Predictions, tokens: slice) -> torch.Tensor:
        advantage = self._advantages[tokens].to(predictions.logprob.device)
        old = predictions.logprob.detach() if self._old is None else self._old[tokens]
        ratio = (predictions.logprob - old).exp()
        clipped = ratio.clamp(self._low, self._high)
        loss = -torch.minimum(ratio * advantage, clipped * advantage)
        if self.settings.beta:
            loss = loss + self.settings.beta * reverse_kl(predictions.teacher, predictions.student)
        return loss

    def clipped(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Where the micro-batch's clipping stops the gradient, ``[T]`` of 0 and 1."""
        if self._old is None:
            return torch.zeros(len(logprobs))
        ratio = (logprobs - self._old).exp().cpu()
        too_high, too_low = ratio > self._high, ratio < self._low
        return ((self._advantages > 0) & too_high | (self._advantages < 0) & too_low).float()

    def signal(self, predictions: Predictions, tokens: slice) -> torch.Tensor:
        return (self._advantages[tokens] != 0).float()


@dataclass(frozen=True)
class GroupAdvantages:
    """Advantages of one group's rollouts, in order; None for those without a reward."""

    advantages: list[float | None]
    has_signal: bool
    """False when all rewards are the same, and nothing is learned from the group."""


STD_EPSILON = 1e-4
"""As in TRL: keeps the advantages of a group finite whose rewards hardly differ."""


def group_advantages(rewards: Sequence[float | None], *, scale: bool) -> GroupAdvantages:
    """``A_i = (r_i − mean r) / (std r + 1e-4)``; without ``scale`` only the mean is taken off.

    None stands for a rollout that the grader failed on: it leaves the group's statistics. The standard deviation is
    that of a sample (n − 1). Fewer than two rewards make no group: all advantages are None.
    """
    known = [reward for reward in rewards if reward is not None]
    if len(known) < 2:
        return GroupAdvantages([None] * len(rewards), has_signal=False)
    mean = sum(known) / len(known)
    deviation = (sum((reward - mean) ** 2 for reward in known) / (len(known) - 1)) ** 0.5
    divisor = deviation + STD_EPSILON if scale else 1.0
    advantages = [None if reward is None else (reward - mean) / divisor for reward in rewards]
    return GroupAdvantages(advantages, has_signal=deviation > 0)
