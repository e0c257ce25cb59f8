"""An arm: an experimental condition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stepalign_run.config.base import Section
from stepalign_run.context import ContextKind

ObjectiveName = Literal["forward_kl", "grpo", "fixed_negative"]
Scope = Literal["full", "through_first_error", "random_step"]


@dataclass(frozen=True)
class Needs:
    """The inputs of an objective besides the rollouts; nothing else is provided."""

    teacher: bool = False
    """The self-teacher's prediction under the arm's context."""
    rewards: bool = False
    """A reward of each rollout, compared within its group."""
    old_logprobs: bool = False
    """The tokens' log-probabilities before the first optimizer step on the batch."""


OBJECTIVES: Mapping[ObjectiveName, Needs] = {
    "forward_kl": Needs(teacher=True),
    "grpo": Needs(rewards=True, old_logprobs=True),
    "fixed_negative": Needs(),
}
"""Every objective with its needs. The trainer has one class for each, under the same name."""


class GrpoSection(Section):
    """Group-relative policy optimisation. Names are those of TRL's ``GRPOConfig`` where it has them."""

    scale_rewards: bool = True
    """Divide the advantages of a group by the standard deviation of its rewards."""
    normalisation: Literal["token", "sequence"] = "token"
    """``token``: every token of the batch weighs the same. ``sequence``: every rollout does."""
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The probability ratio is clipped below 1 − epsilon."""
    epsilon_high: Annotated[float, Field(gt=0)] | None = None
    """The ratio is clipped above 1 + epsilon_high (clip-higher); unset, it is ``epsilon``."""
    num_iterations: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps on the same batch. With one, the ratio is 1 and nothing is clipped."""
    beta: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the KL of the student to the base, over the full vocabulary."""
    reward_needs_eos: bool = True
    """A right answer is rewarded only where the rollout ended by EOS."""


class FixedNegativeSection(Section):
    """One fixed negative advantage on tokens that the student finds unlikely (2608.31046)."""

    advantage: Annotated[float, Field(lt=0)] = -1.0
    """The advantage of those tokens."""
    max_probability: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Tokens whose probability under the student is below this."""


class ComparandsSection(Section):
    """The arms that an arm is compared with first, under the question that the difference answers."""

    paper: tuple[str, ...] = ()
    """Does the paper's order of conditions hold?"""
    leash: tuple[str, ...] = ()
    """Is the baseline weak for want of guards?"""
    scope: tuple[str, ...] = ()
    """Does the place where the loss ends matter?"""
    control: tuple[str, ...] = ()
    """Does a control give the gain, too?"""


class TableSection(Section):
    """An arm's place in tables of arms. It shapes no weight, so it is no part of a run's condition."""

    rank: Annotated[int, Field(ge=1, le=1000)] = 1000
    """Arms of a lower rank stand first, and are A in A − B; equals follow by name."""
    against: ComparandsSection = ComparandsSection()


class ArmSection(Section):
    """An experimental condition.

    The file that ``run.arm`` names holds these keys at its top level, and those of ``TableSection`` in ``[table]``.
    """

    objective: ObjectiveName = "forward_kl"
    """``forward_kl``: self-distillation. ``grpo``: reward on the final answer. ``fixed_negative``: no teacher."""
    context: ContextKind = ContextKind.NULL
    """The self-teacher sees it besides the question."""
    scope: Scope = "full"
    """The tokens that carry the loss."""
    group_size: Annotated[int, Field(ge=1)] = 1
    """Rollouts of the same problem, which are admitted to the queue together."""
    grpo: GrpoSection = GrpoSection()
    fixed_negative: FixedNegativeSection = FixedNegativeSection()

    @property
    def needs_critic(self) -> bool:
        return self.context.needs_critic

    @property
    def needs(self) -> Needs:
        return OBJECTIVES[self.objective]

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> ArmSection:
        for name, untouched in (("grpo", GrpoSection()), ("fixed_negative", FixedNegativeSection())):
            if self.objective != name and getattr(self, name) != untouched:
                raise ValueError(f"arm.{name} has no effect with objective {self.objective!r}; remove it")
        if not self.needs.teacher and self.context is not ContextKind.NULL:
            raise ValueError(f"objective {self.objective!r} has no teacher; remove context {self.context.value!r}")
        if self.scope != "full" and not self.needs_critic:
            raise ValueError(f"scope {self.scope!r} needs a critique, which context {self.context.value!r} has not")
        if self.needs.rewards and self.group_size < 2:
            raise ValueError(
                f"objective {self.objective!r} compares rollouts of a problem: arm.group_size must be at least 2"
            )
        unclipped = GrpoSection()
        clips = (self.grpo.epsilon, self.grpo.epsilon_high) != (unclipped.epsilon, unclipped.epsilon_high)
        if self.grpo.num_iterations == 1 and clips:
            raise ValueError("with grpo.num_iterations = 1 nothing is clipped; remove epsilon and epsilon_high")
        return self
