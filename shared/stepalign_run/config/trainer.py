"""The trainer's sections."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from stepalign_run.config.base import Section
from stepalign_run.fields import Steps


class LoraSection(Section):
    rank: Annotated[int, Field(ge=1)] = 64
    """Rank of the adapter."""
    alpha: Annotated[float, Field(gt=0)] = 128
    """The adapter's output is scaled by alpha / rank."""
    target_modules: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1
    )
    """Linear layers that get an adapter. Never the output head: student and teacher share it."""

    @model_validator(mode="after")
    def _head_is_shared(self) -> LoraSection:
        if {"lm_head", "all-linear"} & set(self.target_modules):
            raise ValueError("target_modules must not hold lm_head: student and teacher share the output head")
        return self


class TrainerSection(Section):
    steps: Steps = 70
    """Updates, each on one batch of rollouts."""
    batch: Annotated[int, Field(ge=1)] = 32
    """Rollouts of an update."""
    micro_batch: Annotated[int, Field(ge=1)] = 8
    """Rollouts computed together; the loss does not depend on it."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 5e-6
    """AdamW, constant, no weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    max_teacher_prompt_tokens: Annotated[int, Field(ge=1)] = 6144
    """A longer teacher prompt drops the rollout with the counted reason ``teacher_prompt_too_long``."""
    logit_chunk: Annotated[int, Field(ge=1)] = 512
    """Tokens whose full-vocabulary logits exist at once."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 1
    """Updates between checkpoints: so many at most are made again after a crash. Above 1 this needs arithmetic that
    gives the same bits again, as on a CPU: an adapter that was published must come out the same."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints kept for resuming, besides the best by validation. Published adapters are all kept."""
    token_view: Annotated[int, Field(ge=0)] = 12
    """Rollouts of the first and of the last update whose tokens the report shows one by one; 0 for none."""
    lora: LoraSection = LoraSection()


class AlarmsSection(Section):
    """When an update looks wrong. An alarm is logged, counted and reported; it does not stop the run.

    Figures are means over ``window`` updates; factors compare them with the mean of the first ``window`` updates.
    """

    window: Annotated[int, Field(ge=1)] = 5
    """Updates whose mean is watched."""
    entropy_factor: Annotated[float, Field(gt=1)] = 10.0
    """Alarm ``entropy``: the student's entropy grew or fell by this factor."""
    entropy_floor: Annotated[float, Field(ge=0)] = 0.05
    """Entropies below this many nats count as this much: a model that is always sure has none to compare with."""
    length_factor: Annotated[float, Field(gt=1)] = 2.0
    """Alarm ``length``: completions became longer or shorter by this factor."""
    truncated: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Alarm ``truncated``: more than this share of the rollouts ran out of tokens."""
    grad_norm_factor: Annotated[float, Field(gt=1)] = 10.0
    """Alarm ``grad_norm``: the gradient's norm grew by this factor. What is not clipped is no cause for alarm."""
    signal_share: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Alarm ``no_signal``: less than this share of the tokens in scope is pushed anywhere."""
    first_token_kl: Annotated[float, Field(gt=0)] = 5.0
    """Alarm ``first_token_kl``: teacher and student disagree by more nats on the first token, as about ``<think>``."""
