"""A rollout on its way through an update: one object for all that is known of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stepalign.errors import UnusableRolloutError
from stepalign_run.config import Config
from stepalign_run.logging import get_logger
from stepalign_run.queue import Delivery
from stepalign_run.rollout import Rollout
from stepalign_trainer.batch.contexts import ContextResult
from stepalign_trainer.batch.examples import Example, ModelLimits, build_example
from stepalign_trainer.objectives.rewards import Reward, Rewards

log = get_logger(__name__)

TRAINED = "trained"


@dataclass(frozen=True)
class Item:
    delivery: Delivery
    context: ContextResult
    reward: Reward
    example: Example | None
    """None where the rollout is skipped."""
    outcome: str
    """``trained`` or ``skipped:REASON``, as the queue counts it."""

    @property
    def rollout(self) -> Rollout:
        return self.delivery.rollout


def make_items(
    config: Config,
    tokenizer: Any,
    limits: ModelLimits,
    deliveries: Sequence[Delivery],
    contexts: Sequence[ContextResult],
    rewards: Rewards,
) -> list[Item]:
    """One for each delivery, in order; ``contexts`` has one for each, too."""
    return [
        _item(config, tokenizer, limits, delivery, context, rewards.of(delivery.rollout))
        for delivery, context in zip(deliveries, contexts, strict=True)
    ]


def _item(
    config: Config,
    tokenizer: Any,
    limits: ModelLimits,
    delivery: Delivery,
    context: ContextResult,
    reward: Reward,
) -> Item:
    """Nothing that a rollout holds ends a run: one that no update can use is skipped."""
    rollout = delivery.rollout
    if context.context is None or reward.skip_reason is not None:
        return _skipped(delivery, context, reward, context.skip_reason or reward.skip_reason or "", None)
    try:
        example = build_example(config, tokenizer, limits, rollout, context.context, context.critique, reward.advantage)
    except UnusableRolloutError as error:
        return _skipped(delivery, context, reward, error.reason.value, str(error))
    return Item(delivery, context, reward, example, TRAINED)


def _skipped(delivery: Delivery, context: ContextResult, reward: Reward, reason: str, error: str | None) -> Item:
    log.warning("skipped", rollout_id=delivery.rollout.rollout_id, reason=reason, error=error)
    return Item(delivery, context, reward, None, f"skipped:{reason}")
