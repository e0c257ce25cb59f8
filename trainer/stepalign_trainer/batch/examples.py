"""A rollout with its context → the token ids that student and teacher read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stepalign.errors import ContentError, UnusableReason, UnusableRolloutError
from stepalign.prompts import load_prompt, render_token_ids
from stepalign.types import Critique
from stepalign_run.config import Config
from stepalign_run.context import Context
from stepalign_run.rollout import Rollout
from stepalign_trainer.batch.contexts import CONTEXTS
from stepalign_trainer.batch.scope import TokenGroups, token_groups
from stepalign_trainer.batch.spans import token_spans


@dataclass(frozen=True)
class ModelLimits:
    """What a model can read."""

    tokens: int
    """Token ids from 0 on that it has an embedding and a logit for."""
    positions: int | None
    """Its longest sequence; None where its configuration names none."""


@dataclass(frozen=True)
class Example:
    """One rollout's share of an update."""

    rollout_id: str
    student_prompt: list[int]
    teacher_prompt: list[int]
    completion: list[int]
    groups: TokenGroups
    truncated: bool
    advantage: float | None = None
    """The rollout's advantage in its group, of an objective with rewards."""


def teacher_prompt_ids(config: Config, tokenizer: Any, rollout: Rollout, context: Context) -> list[int]:
    """The teacher's prompt. Without a context and without template options of its own it is the student's, token by
    token.

    Raises UnusableRolloutError over ``trainer.max_teacher_prompt_tokens``, since it is never cut, and for a context
    that only a control token could write.
    """
    name = CONTEXTS[context.kind].prompt
    if name is None:
        # A teacher that may think is one without a context, too. Without a teacher, this is the base for the KL.
        if not config.arm.needs.teacher or not config.model.teacher_chat_template_options:
            return rollout.prompt_token_ids
        messages = load_prompt(config.model.prompts, "student").fill(question=rollout.problem.question)
    else:
        prompt = load_prompt(config.model.prompts, name)
        messages = prompt.fill(question=rollout.problem.question, context=context.text)
    options = config.model.teacher_chat_template_options or config.model.chat_template_options
    what = f"the teacher prompt of rollout {rollout.rollout_id!r}"
    try:
        token_ids = render_token_ids(tokenizer, messages, **options)
    except ContentError as error:
        raise UnusableRolloutError(UnusableReason.TEACHER_PROMPT_UNWRITABLE, f"{what}: {error}") from error
    budget = config.trainer.max_teacher_prompt_tokens
    if len(token_ids) > budget:
        raise UnusableRolloutError(
            UnusableReason.TEACHER_PROMPT_TOO_LONG,
            f"{what} has {len(token_ids)} tokens, over its budget of {budget}; raise trainer.max_teacher_prompt_tokens "
            "or leave the problem out",
        )
    return token_ids


def check_readable(rollout: Rollout, prompt: list[int], limits: ModelLimits) -> None:
    """Raises UnusableRolloutError when a model cannot read the completion under ``prompt``.

    Such a rollout was sampled from another model, or by another solver's budgets.
    """
    read = [*prompt, *rollout.completion_token_ids]
    unknown = next((token for token in read if token >= limits.tokens), None)
    if unknown is not None:
        raise UnusableRolloutError(
            UnusableReason.UNKNOWN_TOKENS,
            f"rollout {rollout.rollout_id!r} holds the token id {unknown}, the model has {limits.tokens}; solver and "
            "trainer must have the same model",
        )
    if limits.positions is not None and len(read) > limits.positions:
        raise UnusableRolloutError(
            UnusableReason.TOO_LONG_FOR_THE_MODEL,
            f"rollout {rollout.rollout_id!r} and its prompt have {len(read)} tokens, the model has {limits.positions} "
            "positions; solver and trainer must have the same solver.max_new_tokens",
        )


def build_example(
    config: Config,
    tokenizer: Any,
    limits: ModelLimits,
    rollout: Rollout,
    context: Context,
    critique: Critique | None,
    advantage: float | None = None,
) -> Example:
    """``critique`` is that of this very rollout, in every arm: it tells where the first error is.

    Raises UnusableRolloutError.
    """
    teacher_prompt = teacher_prompt_ids(config, tokenizer, rollout, context)
    for prompt in (rollout.prompt_token_ids, teacher_prompt):
        check_readable(rollout, prompt, limits)
    return Example(
        rollout_id=rollout.rollout_id,
        student_prompt=rollout.prompt_token_ids,
        teacher_prompt=teacher_prompt,
        completion=rollout.completion_token_ids,
        groups=token_groups(config.arm.scope, rollout, critique, token_spans(rollout, tokenizer)),
        truncated=rollout.finish_reason == "length",
        advantage=advantage,
    )
