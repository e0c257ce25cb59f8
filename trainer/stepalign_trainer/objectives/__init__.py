"""Objectives, that is, losses and their weights: one module each, under the names of ``arm.objective``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from stepalign_run.config import ArmSection
from stepalign_run.config.arm import ObjectiveName
from stepalign_trainer.objectives.base import Objective
from stepalign_trainer.objectives.fixed_negative import FixedNegative
from stepalign_trainer.objectives.forward_kl import ForwardKl
from stepalign_trainer.objectives.grpo import Grpo

__all__ = ["Objective", "make_objective"]

_MAKERS: Mapping[ObjectiveName, Callable[[ArmSection], Objective]] = {
    "forward_kl": lambda arm: ForwardKl(),
    "grpo": lambda arm: Grpo(arm.grpo),
    "fixed_negative": lambda arm: FixedNegative(arm.fixed_negative),
}


def make_objective(arm: ArmSection) -> Objective:
    return _MAKERS[arm.objective](arm)
