"""A rollout on its way through an update: one object for all that is known of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stepalign.errors import PromptTooLongError
from stepalign_run.config import Config
from stepalign_run.logging import get_logger
from stepalign_run.queue import Delivery
from stepalign_run.rollout import Rollout
from stepalign_trainer.batch.contexts import ContextResult
from stepalign_trainer.batch.examples import Example, build_example
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
    deliveries: Sequence[Delivery],
    contexts: Sequence[ContextResult],
    rewards: Rewards,
) -> list[Item]:
    """One for each delivery, in order; ``contexts`` has one for each, too."""
    return [
        _item(config, tokenizer, delivery, context, rewards.of(delivery.rollout))
        for delivery, context in zip(deliveries, contexts, strict=True)
    ]


def _item(config: Config, tokenizer: Any, delivery: Delivery, context: ContextResult, reward: Reward) -> Item:
    if context.context is None or reward.skip_reason is not None:
        return Item(delivery, context, reward, None, f"skipped:{context.skip_reason or reward.skip_reason}")
    try:
        example = build_example(
            config, tokenizer, delivery.rollout, context.context, context.critique, reward.advantage
        )
    except PromptTooLongError as error:
        log.warning("skipped", rollout_id=delivery.rollout.rollout_id, error=str(error))
        return Item(delivery, context, reward, None, "skipped:teacher_prompt_too_long")
    return Item(delivery, context, reward, example, TRAINED)
