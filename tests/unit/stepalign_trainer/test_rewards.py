"""The binary reward, and what a failing grader costs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from stepalign.critique.answers import answers_equal
from stepalign.errors import GraderError
from stepalign_run.config import FixedNegativeSection, GrpoSection
from stepalign_run.rollout import Rollout
from stepalign_run.testing import MemoryRolloutQueue
from stepalign_trainer.objectives.fixed_negative import FixedNegative
from stepalign_trainer.objectives.forward_kl import ForwardKl
from stepalign_trainer.objectives.grpo import Grpo, reward_batch
from stepalign_trainer.objectives.rewards import Reward, reward

MakeRollout = Callable[..., Rollout]
Run = Any  # that of conftest.py


def failing_on_five(answer: str, known_answer: str) -> bool:
    """A grader that breaks on the answer of the attempt ``wrong_answer``."""
    if answer == "5":
        raise RuntimeError("no such answer")
    return answers_equal(answer, known_answer)


@pytest.mark.parametrize(
    ("attempt", "finish", "leashed", "unleashed"),
    [
        ("right", "stop", 1.0, 1.0),
        ("right", "length", 0.0, 1.0),
        ("wrong_answer", "stop", 0.0, 0.0),
        ("unfinished", "length", 0.0, 0.0),
        ("unfinished", "stop", 0.0, 0.0),
        ("<step_1> 3 + 4 = 7 </step_1> <answer> </answer>", "stop", 0.0, 0.0),
    ],
)
def test_a_right_answer_is_rewarded_only_with_eos_where_the_leash_asks(
    rollout_of: MakeRollout, attempt: str, finish: str, leashed: float, unleashed: float
) -> None:
    rollout = rollout_of(attempt, finish)
    assert reward(rollout, answers_equal, needs_eos=True) == leashed
    assert reward(rollout, answers_equal, needs_eos=False) == unleashed
    for settings, value in ((GrpoSection(), leashed), (GrpoSection(reward_needs_eos=False), unleashed)):
        objective = Grpo(settings)
        assert objective.reward(rollout, answers_equal) == value
        assert objective.rewards([rollout], answers_equal).of(rollout).value == value


def test_a_failing_grader_gives_no_reward_and_no_answer_needs_no_grader(rollout_of: MakeRollout) -> None:
    with pytest.raises(GraderError, match="no such answer"):
        reward(rollout_of("wrong_answer"), failing_on_five, needs_eos=True)
    assert reward(rollout_of("wrong_answer", "length"), failing_on_five, needs_eos=True) == 0.0


def group(rollout_of: MakeRollout, name: str, attempts: list[str]) -> list[Rollout]:
    return [rollout_of(a, rollout_id=f"{name}/{i}", group_id=name) for i, a in enumerate(attempts)]


def test_rollouts_are_compared_within_their_group_alone(rollout_of: MakeRollout) -> None:
    easy, hard = (
        group(rollout_of, "easy", ["right", "right", "wrong_answer", "right"]),
        group(rollout_of, "hard", ["wrong_step", "right", "wrong_step", "wrong_step"]),
    )
    mixed = [rollout for pair in zip(easy, hard, strict=True) for rollout in pair]  # in whatever order they come
    batch = reward_batch(mixed, GrpoSection(scale_rewards=False), answers_equal)
    assert [batch.of(rollout).advantage for rollout in easy] == [0.25, 0.25, -0.75, 0.25]
    assert [batch.of(rollout).advantage for rollout in hard] == [-0.25, 0.75, -0.25, -0.25]
    assert batch.columns == {"reward_mean": 0.5, "groups_without_signal": 0}
    assert {batch.of(rollout).skip_reason for rollout in mixed} == {None} and len(batch.by_rollout) == 8


def test_a_grader_error_leaves_its_group_and_one_alone_is_no_group(rollout_of: MakeRollout) -> None:
    rollouts = [
        *group(rollout_of, "a", ["right", "wrong_answer", "wrong_step"]),
        *group(rollout_of, "b", ["right", "wrong_answer"]),
        *group(rollout_of, "c", ["right", "right"]),
    ]
    batch = reward_batch(rollouts, GrpoSection(scale_rewards=False), failing_on_five)
    assert batch.by_rollout == {
        "a/0": Reward(1.0, 0.5),
        "a/1": Reward(skip_reason="grader_error"),
        "a/2": Reward(0.0, -0.5),
        "b/0": Reward(1.0, skip_reason="group_too_small"),
        "b/1": Reward(skip_reason="grader_error"),
        "c/0": Reward(1.0, 0.0),
        "c/1": Reward(1.0, 0.0),
    }
    assert batch.columns == {"reward_mean": 0.8, "groups_without_signal": 2}


def test_an_objective_without_rewards_gives_none_and_skips_nothing(rollout_of: MakeRollout) -> None:
    rollout = rollout_of("right")
    for objective in (ForwardKl(), FixedNegative(FixedNegativeSection())):
        found = objective.rewards([rollout], answers_equal)
        assert found.of(rollout) == Reward() and found.columns == {}
        assert objective.reward(rollout, answers_equal) is None


def test_the_rest_of_a_group_is_trained_when_the_grader_fails_on_one(make_run: Callable[..., Run]) -> None:
    """As if the rollout that could not be graded had never been there."""
    options = ("--run.arm", "grpo", "--trainer.batch", "8", "--arm.group_size", "4", "--trainer.steps", "1")
    whole, broken = make_run("--run.name", "whole", *options), make_run("--run.name", "broken", *options)
    names = ["right", "wrong_step", "missing_step", "wrong_step"]
    for run, first_group in ((whole, ["right", "wrong_step"]), (broken, ["right", "wrong_step", "wrong_answer"])):
        run.publish(0, [*first_group], whole=False, group_size=len(first_group))
        others = [run.rollout_of(n, rollout_id=f"v000000/q/{i}", group_id="q") for i, n in enumerate(names)]
        trainer = run.trainer()
        trainer.grader = failing_on_five
        asyncio.run(MemoryRolloutQueue(run.broker, "solver", trainer.config.queue).publish(others))
        asyncio.run(run.store.announce_sampled(0))
        run.finish(trainer)
    row, expected = broken.rows()[0], whole.rows()[0]
    assert row["outcomes"] == {"skipped:grader_error": 1, "trained": 6}
    assert broken.status.skipped == {"grader_error": 1} and broken.status.balanced and broken.status.length == 0
    assert row["reward_mean"] == expected["reward_mean"] == 0.5
    assert row["loss"] == expected["loss"]
    assert broken.store.published[-1].sha256 == whole.store.published[-1].sha256


def test_a_rollout_that_is_left_alone_is_skipped_and_counted(make_run: Callable[..., Run]) -> None:
    run = make_run("--run.arm", "grpo", "--arm.group_size", "2", "--trainer.steps", "1")
    run.publish(0, ["right", "wrong_answer", "right", "wrong_step"], group_size=2)
    trainer = run.trainer()
    trainer.grader = failing_on_five
    run.finish(trainer)
    assert run.status.skipped == {"grader_error": 1, "group_too_small": 1} and run.status.trained == 2
