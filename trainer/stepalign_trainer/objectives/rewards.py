"""The binary reward: 1 for a right final answer, 0 otherwise, and no reward where the grader failed or cannot tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stepalign.critique.answers import Grader
from stepalign.critique.trace import parse_trace
from stepalign.errors import GraderError
from stepalign.scoring import is_right
from stepalign_run.logging import get_logger
from stepalign_run.rollout import Rollout

log = get_logger(__name__)


@dataclass(frozen=True)
class Reward:
    """A rollout's reward, and its advantage over its group or the reason why it has none and is skipped."""

    value: float | None = None
    advantage: float | None = None
    skip_reason: str | None = None


@dataclass(frozen=True)
class Rewards:
    """Of a batch, by rollout id; empty under an objective without rewards."""

    by_rollout: Mapping[str, Reward] = field(default_factory=dict[str, Reward])
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """For the update's row of metrics."""

    def of(self, rollout: Rollout) -> Reward:
        return self.by_rollout.get(rollout.rollout_id, Reward())


def reward(rollout: Rollout, grader: Grader, *, needs_eos: bool) -> float:
    """1 or 0. ``needs_eos``: a rollout that ran out of tokens gets 0. Raises GraderError when the grader fails."""
    trace = parse_trace(rollout.text)
    return float(is_right(trace, rollout.finish_reason, rollout.problem, grader, needs_eos=needs_eos))


def reward_or_none(rollout: Rollout, grader: Grader, *, needs_eos: bool) -> float | None:
    """None, and a line in the log, when the grader fails."""
    try:
        return reward(rollout, grader, needs_eos=needs_eos)
    except GraderError as error:
        log.warning("no reward", rollout_id=rollout.rollout_id, problem=rollout.problem.id, error=str(error))
        return None
