"""The binary reward of GRPO: 1 for a right final answer, 0 otherwise, and no reward where the grader failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stepalign.critique.trace import parse_trace
from stepalign.errors import GraderError
from stepalign.plugins import Grader
from stepalign.scoring import is_right
from stepalign_run.config import GrpoSection
from stepalign_run.logging import get_logger
from stepalign_run.rollout import Rollout
from stepalign_trainer.objectives.grpo import group_advantages

log = get_logger(__name__)


@dataclass
class Rewards:
    """Rewards and advantages of a batch, by rollout id."""

    rewards: dict[str, float] = field(default_factory=dict[str, float])
    advantages: dict[str, float] = field(default_factory=dict[str, float])
    skip_reasons: dict[str, str] = field(default_factory=dict[str, str])
    """Why a rollout has no advantage."""
    groups_without_signal: int = 0
    """Groups whose rewards are all the same."""

    def as_row(self) -> dict[str, Any]:
        values = list(self.rewards.values())
        mean = sum(values) / len(values) if values else None
        return {"reward_mean": mean, "groups_without_signal": self.groups_without_signal}


def reward(rollout: Rollout, settings: GrpoSection, grader: Grader) -> float:
    """1 or 0. Raises GraderError when the grader fails."""
    trace = parse_trace(rollout.text)
    needs_eos = settings.reward_needs_eos
    return float(is_right(trace, rollout.finish_reason, rollout.problem, grader, needs_eos=needs_eos))


def reward_batch(rollouts: Sequence[Rollout], settings: GrpoSection, grader: Grader) -> Rewards:
    """Reward each rollout, and compare it with its group.

    Rollouts that the grader failed on leave their group (``grader_error``); one that is then left alone, or whose
    group went to the dead letters, has nothing to be compared with (``group_too_small``).
    """
    batch = Rewards()
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group_id, []).append(rollout)
    for group in groups.values():
        values = [_reward_or_none(rollout, settings, grader) for rollout in group]
        compared = group_advantages(values, scale=settings.scale_rewards)
        batch.groups_without_signal += not compared.has_signal
        for rollout, value, advantage in zip(group, values, compared.advantages, strict=True):
            if value is not None:
                batch.rewards[rollout.rollout_id] = value
            if advantage is not None:
                batch.advantages[rollout.rollout_id] = advantage
            else:
                batch.skip_reasons[rollout.rollout_id] = "grader_error" if value is None else "group_too_small"
    return batch


def _reward_or_none(rollout: Rollout, settings: GrpoSection, grader: Grader) -> float | None:
    try:
        return reward(rollout, settings, grader)
    except GraderError as error:
        log.warning("no reward", rollout_id=rollout.rollout_id, error=str(error))
        return None
