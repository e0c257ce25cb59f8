"""A rollout with its context → the token ids that student and teacher read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stepalign.errors import PromptTooLongError
from stepalign.prompts import load_prompt, render_token_ids
from stepalign.types import Critique
from stepalign_run.config import Config
from stepalign_run.context import Context
from stepalign_run.rollout import Rollout
from stepalign_trainer.batch.contexts import CONTEXTS
from stepalign_trainer.batch.scope import TokenGroups, token_groups, token_spans


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

    Raises PromptTooLongError over ``trainer.max_teacher_prompt_tokens``; it is never cut.
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
    token_ids = render_token_ids(tokenizer, messages, **options)
    budget = config.trainer.max_teacher_prompt_tokens
    if len(token_ids) > budget:
        what = f"the teacher prompt of rollout {rollout.rollout_id!r}"
        raise PromptTooLongError(what, len(token_ids), budget, "trainer.max_teacher_prompt_tokens")
    return token_ids


def build_example(
    config: Config,
    tokenizer: Any,
    rollout: Rollout,
    context: Context,
    critique: Critique | None,
    advantage: float | None = None,
) -> Example:
    """``critique`` is that of this very rollout, in every arm: it tells where the first error is.

    Raises PromptTooLongError, and ValueError when the rollout's text is not the decoding of its ids."""
    return Example(
        rollout_id=rollout.rollout_id,
        student_prompt=rollout.prompt_token_ids,
        teacher_prompt=teacher_prompt_ids(config, tokenizer, rollout, context),
        completion=rollout.completion_token_ids,
        groups=token_groups(config.arm.scope, rollout, critique, token_spans(rollout, tokenizer)),
        truncated=rollout.finish_reason == "length",
        advantage=advantage,
    )
