"""What is minimised: per-token losses, and the weight of each token in the batch.

The loss of a batch is ``Σ_t w_t · ℓ_t``. Weights are known before the first micro-batch, so the loss does not depend on
how the batch is split. Sources::

    forward_kl      ℓ_t = KL(π_θ0(·|x, c, y_<t) ‖ π_θ(·|x, y_<t)), w_t = 1/|M| in scope       arXiv 2606.11173
    grpo            ℓ_t = −min(r_t A, clip(r_t, 1−ε, 1+ε_high) A) + β KL(π_θ ‖ π_θ0)          arXiv 2402.03300
                    r_t = π_θ(y_t)/π_old(y_t); A from the rewards of the rollout's group
    fixed_negative  ℓ_t = −a · π_θ(y_t)/sg(π_θ(y_t)) where π_θ(y_t) < p, else 0               arXiv 2608.31046

GRPO's KL is the full-vocabulary one, not an estimate from the sampled token, and ``w_t`` is 1/(tokens of the batch)
(``token``) or 1/(rollouts · tokens of the rollout) (``sequence``). No logits are divided by the sampling temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from stepalign.config import ArmSection, FixedNegativeSection, GrpoSection
from stepalign_trainer.divergence import Predictions, reverse_kl
from stepalign_trainer.examples import Example

SIGNAL_NATS = 0.01
"""A token whose teacher and student are closer than this is pushed nowhere worth mentioning."""


class Objective(Protocol):
    iterations: int
    """Optimizer steps on one batch."""
    floor: float | None
    """What no batch's loss falls below, None where there is no such value. At it there is nothing to learn."""

    def weights(self, examples: Sequence[Example]) -> list[torch.Tensor]:
        """The weight of each token of each example, ``[T_i]``, together 1; all zero for an empty batch."""
        ...

    def begin(self, examples: Sequence[Example], old_logprobs: torch.Tensor | None) -> None:
        """Take a micro-batch; ``old_logprobs [T]`` are those before the first optimizer step, None in that step."""
        ...

    def token_loss(self, predictions: Predictions, tokens: slice) -> torch.Tensor:
        """Losses ``[T]`` of the micro-batch's ``tokens``."""
        ...

    def signal(self, predictions: Predictions, tokens: slice) -> torch.Tensor:
        """Which of the ``tokens`` are pushed somewhere, ``[T]`` of 0 and 1."""
        ...


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


def _mean_weights(examples: Sequence[Example], normalisation: str) -> list[torch.Tensor]:
    total = sum(len(example.completion) for example in examples)
    sizes = [len(example.completion) for example in examples]
    return [torch.full((n,), 1 / (total if normalisation == "token" else len(examples) * n)) for n in sizes]


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


def make_objective(arm: ArmSection) -> Objective:
    if arm.objective == "grpo":
        return Grpo(arm.grpo)
    return FixedNegative(arm.fixed_negative) if arm.objective == "fixed_negative" else ForwardKl()


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
