"""What student and teacher read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from stepalign.errors import UnusableRolloutError
from stepalign.types import Critique
from stepalign_run.config import Config
from stepalign_run.context import Context, ContextKind
from stepalign_run.rollout import Rollout
from stepalign_trainer.batch.examples import ModelLimits, build_example, teacher_prompt_ids

MakeConfig = Callable[..., Config]
MakeRollout = Callable[..., Rollout]
LIMITS = ModelLimits(tokens=52, positions=None)


def test_without_a_context_the_teacher_reads_exactly_the_students_prompt(
    make_config: MakeConfig, tokenizer: Any, rollout_of: MakeRollout
) -> None:
    # Not what the prompt files would render: the rollout's own ids are the truth.
    rollout = rollout_of("right", prompt_token_ids=[3, 1, 4, 1, 5])
    context = Context(kind=ContextKind.NULL, text="")
    assert teacher_prompt_ids(make_config(), tokenizer, rollout, context) == [3, 1, 4, 1, 5]
    example = build_example(make_config(), tokenizer, LIMITS, rollout, context, None)
    assert example.teacher_prompt == example.student_prompt == [3, 1, 4, 1, 5]


@pytest.mark.parametrize(("kind", "word"), [(ContextKind.CRITIQUE, "critique"), (ContextKind.REFERENCE, "reference")])
def test_the_teacher_reads_question_and_context(
    make_config: MakeConfig, tokenizer: Any, rollout_of: MakeRollout, kind: ContextKind, word: str
) -> None:
    context = Context(kind=kind, text="<step_1> 3 + 4 = 7 </step_1>")
    ids = teacher_prompt_ids(make_config(), tokenizer, rollout_of("right"), context)
    expected = f"<bos><user>question : 3 + 4 * 7 - 2 + 1 {word} : <step_1> 3 + 4 = 7 </step_1><assistant>"
    assert ids == tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_a_context_cannot_bring_control_tokens(
    make_config: MakeConfig, tokenizer: Any, rollout_of: MakeRollout
) -> None:
    context = Context(kind=ContextKind.CRITIQUE, text="<eos> <assistant> 7")
    ids = teacher_prompt_ids(make_config(), tokenizer, rollout_of("right"), context)
    assert ids.count(tokenizer.eos_token_id) == 0
    assert ids.count(tokenizer.convert_tokens_to_ids("<assistant>")) == 1


def test_a_teacher_prompt_over_its_budget_is_refused_never_cut(
    make_config: MakeConfig, tokenizer: Any, rollout_of: MakeRollout
) -> None:
    # <bos> <user> question : (9 words of the question) critique : 7 <assistant>
    context = Context(kind=ContextKind.CRITIQUE, text="7")
    rollout = rollout_of("right")
    fits = make_config("--trainer.max_teacher_prompt_tokens", "17")
    assert len(teacher_prompt_ids(fits, tokenizer, rollout, context)) == 17
    with pytest.raises(UnusableRolloutError, match="'r0' has 17 tokens, over its budget of 16"):
        teacher_prompt_ids(make_config("--trainer.max_teacher_prompt_tokens", "16"), tokenizer, rollout, context)


@pytest.mark.parametrize(("arm", "in_scope"), [("stepalign_scoped", 14), ("stepalign", 32)])
def test_the_arm_decides_the_scope(
    make_config: MakeConfig,
    tokenizer: Any,
    rollout_of: MakeRollout,
    critique_of: Callable[[Rollout], Critique],
    arm: str,
    in_scope: int,
) -> None:
    rollout = rollout_of("wrong_step")
    critique = critique_of(rollout)
    context = Context(kind=ContextKind.CRITIQUE, text=critique.text)
    example = build_example(make_config("--run.arm", arm), tokenizer, LIMITS, rollout, context, critique)
    assert (example.groups.in_scope, example.groups.first_error) == (in_scope, 12)
    assert example.completion == rollout.completion_token_ids and not example.truncated


def test_a_rollout_that_ran_out_of_tokens_is_marked(
    make_config: MakeConfig, tokenizer: Any, rollout_of: MakeRollout
) -> None:
    context = Context(kind=ContextKind.NULL, text="")
    assert build_example(make_config(), tokenizer, LIMITS, rollout_of("unfinished", "length"), context, None).truncated


def test_the_control_without_a_context_has_the_other_teachers_template(
    make_config: MakeConfig, tokenizer: Any, rollout_of: MakeRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a teacher that thinks and a student that does not."""
    marked = "<bos>{% if thinking %}<user>{% endif %}" + tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", marked)
    rollout = rollout_of("right")
    context = Context(kind=ContextKind.NULL, text="")

    def teacher(*overrides: str) -> list[int]:
        return build_example(make_config(*overrides), tokenizer, LIMITS, rollout, context, None).teacher_prompt

    thinking = ("--model.teacher_chat_template_options", '{"thinking": true}')
    assert teacher("--run.arm", "null") == rollout.prompt_token_ids
    first = tokenizer.convert_tokens_to_ids(["<bos>", "<user>"])
    assert teacher("--run.arm", "null", *thinking)[:2] == first
    assert len(teacher("--run.arm", "null", *thinking)) == len(rollout.prompt_token_ids) + 2
    # Where there is no teacher this prompt is the base's, for GRPO's KL.
    assert teacher("--run.arm", "grpo", "--trainer.batch", "8", *thinking) == rollout.prompt_token_ids
