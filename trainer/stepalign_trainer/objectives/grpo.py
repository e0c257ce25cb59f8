"""Group-relative policy optimisation.

Source: Shao et al., DeepSeekMath, arXiv 2402.03300; names and constants follow TRL's ``GRPOTrainer``::

    ℓ_t = −min(r_t A, clip(r_t, 1−ε, 1+ε_high) A) + β KL(π_θ ‖ π_θ0)
    r_t = π_θ(y_t)/π_old(y_t)        A_i = (r_i − mean r)/(std r + 1e-4), over the rollouts of one problem

``w_t`` is 1/(tokens of the batch) (``token``) or 1/(rollouts · tokens of the rollout) (``sequence``). Deviations:

1. The KL is to the base with the adapter off, over the full vocabulary, not an estimate from the sampled token.
2. ``token`` is the default; the source has ``sequence``.
3. ``reward_needs_eos``: a right answer is rewarded only where the rollout ended by EOS. Off, it is the source's.
4. ``epsilon_high`` may exceed ε (clip-higher, DAPO, arXiv 2503.14476). Unset, it is ε.
5. A rollout that the grader failed on leaves its group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from stepalign.critique.answers import Grader
from stepalign_run.config import GrpoSection
from stepalign_run.config.arm import OBJECTIVES
from stepalign_run.rollout import Rollout
from stepalign_trainer.batch.examples import Example
from stepalign_trainer.objectives.base import Objective, mean_weights
from stepalign_trainer.objectives.divergence import Predictions, TokenTerms, reverse_kl
from stepalign_trainer.objectives.rewards import Reward, Rewards, reward_or_none


class Grpo(Objective):
    needs = OBJECTIVES["grpo"]

    def __init__(self, settings: GrpoSection) -> None:
        self.settings = settings
        self.iterations = settings.num_iterations
        self._low = 1 - settings.epsilon
        self._high = 1 + (settings.epsilon if settings.epsilon_high is None else settings.epsilon_high)
        self._advantages = torch.empty(0)
        self._old: torch.Tensor | None = None

    def reward(self, rollout: Rollout, grader: Grader) -> float | None:
        return reward_or_none(rollout, grader, needs_eos=self.settings.reward_needs_eos)

    def rewards(self, rollouts: Sequence[Rollout], grader: Grader) -> Rewards:
        return reward_batch(rollouts, self.settings, grader)

    def weights(self, examples: Sequence[Example]) -> list[torch.Tensor]:
        return mean_weights(examples, self.settings.normalisation)

    def begin(self, examples: Sequence[Example], old_logprobs: torch.Tensor | None) -> None:
        self._advantages = torch.cat([_advantages(example) for example in examples])
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

    def signal(self, predictions: Predictions, tokens: slice) -> torch.Tensor:
        return (self._advantages[tokens] != 0).float()

    def columns(
        self, examples: Sequence[Example], first: Sequence[TokenTerms], last: Sequence[TokenTerms]
    ) -> Mapping[str, float]:
        """``kl_to_base``: the KL of the first step. ``clip_fraction``: the share of tokens clipped in the last one."""
        if not examples:
            return {}
        clipped = [
            self.clipped(_advantages(example), before.logprob, now.logprob)
            for example, before, now in zip(examples, first, last, strict=True)
        ]
        return {
            "kl_to_base": torch.cat([terms.reverse_kl for terms in first]).mean().item(),
            "clip_fraction": torch.cat(clipped).mean().item(),
        }

    def clipped(self, advantages: torch.Tensor, old: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
        """Where clipping stops the gradient. All ``[T]``; the result is of 0 and 1."""
        ratio = (logprobs - old).exp()
        too_high, too_low = ratio > self._high, ratio < self._low
        return ((advantages > 0) & too_high | (advantages < 0) & too_low).float()


def _advantages(example: Example) -> torch.Tensor:
    """One value for the whole rollout, ``[T]``."""
    if example.advantage is None:
        raise ValueError(f"rollout {example.rollout_id!r} has no advantage")
    return torch.full((len(example.completion),), example.advantage)


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


def reward_batch(rollouts: Sequence[Rollout], settings: GrpoSection, grader: Grader) -> Rewards:
    """Reward each rollout, and compare it with its group.

    Rollouts that the grader failed on leave their group (``grader_error``); one that is then left alone, or whose
    group went to the dead letters, has nothing to be compared with (``group_too_small``).
    """
    found: dict[str, Reward] = {}
    without_signal = 0
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group_id, []).append(rollout)
    for group in groups.values():
        values = [reward_or_none(rollout, grader, needs_eos=settings.reward_needs_eos) for rollout in group]
        compared = group_advantages(values, scale=settings.scale_rewards)
        without_signal += not compared.has_signal
        for rollout, value, advantage in zip(group, values, compared.advantages, strict=True):
            missing = "grader_error" if value is None else "group_too_small"
            found[rollout.rollout_id] = Reward(value, advantage, missing if advantage is None else None)
    known = [each.value for each in found.values() if each.value is not None]
    mean = sum(known) / len(known) if known else None
    return Rewards(found, {"reward_mean": mean, "groups_without_signal": without_signal})
