"""Objectives: what is minimised, one module each. :func:`make_objective` names them."""

from __future__ import annotations

from stepalign_run.config import ArmSection
from stepalign_trainer.objectives.base import Objective
from stepalign_trainer.objectives.fixed_negative import FixedNegative
from stepalign_trainer.objectives.forward_kl import ForwardKl
from stepalign_trainer.objectives.grpo import Grpo

__all__ = ["Objective", "make_objective"]


def make_objective(arm: ArmSection) -> Objective:
    if arm.objective == "grpo":
        return Grpo(arm.grpo)
    return FixedNegative(arm.fixed_negative) if arm.objective == "fixed_negative" else ForwardKl()
