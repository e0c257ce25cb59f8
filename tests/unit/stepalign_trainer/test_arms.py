"""Every arm that is shipped, through the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stepalign_lab.checker import exact_critique
from stepalign_run.config import Config, shipped_arms
from stepalign_trainer.update.learner import Learner

pytestmark = pytest.mark.slow

Run = Any  # that of conftest.py
OPTIONS = ("--trainer.batch", "16", "--queue.capacity", "64", "--trainer.micro_batch", "16")
NAMES = ["right", "wrong_step", "missing_step", "wrong_answer"] * 2 + ["other_right", "other_wrong"] * 4
METRICS = {
    "step",
    "rollouts",
    "loss",
    "kl_all_tokens",
    "advantage_correct",
    "advantage_correct_below",
    "advantage_at_error",
    "advantage_after_error",
    "first_token_kl",
    "entropy",
    "mean_tokens",
    "truncated",
    "grad_norm",
    "trained_rollouts",
    "tokens",
    "tokens_in_scope",
    "signal_share",
    "outcomes",
    "critiques",
    "alarms",
}
GRPO_METRICS = {"reward_mean", "groups_without_signal", "clip_fraction", "kl_to_base"}


@pytest.mark.parametrize("arm", shipped_arms())
def test_two_updates_of_every_arm(
    make_run: Callable[..., Run], make_config: Callable[..., Config], tokenizer: Any, arm: str
) -> None:
    run = make_run("--run.arm", arm, *OPTIONS)
    config = run.make_config()
    for version in (0, 1):
        run.publish(version, NAMES, group_size=config.arm.group_size)
    trainer = run.train(checker=exact_critique)
    status = run.status
    assert (status.published, status.trained, status.length) == (32, 32, 0) and status.balanced
    rows = run.rows()
    assert [row["step"] for row in rows] == [1, 2]
    grpo = config.arm.objective == "grpo"
    for row in rows:
        assert row.keys() == METRICS | (GRPO_METRICS if grpo else set())
        assert row["outcomes"] == {"trained": 16} and row["alarms"] == []
        asked = {"correct": 6, "incorrect": 8, "unjustified": 2} if config.arm.needs_critic else {}
        assert row["critiques"] == asked
        # The critic or the checker tells where the errors are, in every arm.
        assert row["advantage_at_error"] is not None and row["advantage_correct"] is not None
        scoped = row["tokens_in_scope"] < row["tokens"]
        assert scoped == (config.arm.scope != "full")
    own = config.arm.context.value
    assert all(own in row["contexts"] for row in run.rows("tokens.jsonl"))
    fresh = Learner(config, tokenizer)
    moved = [
        not torch.equal(ours, theirs) for ours, theirs in zip(trainer.learner.parameters, fresh.parameters, strict=True)
    ]
    if arm == "null":
        assert not any(moved)
        figures = ("loss", "signal_share", "grad_norm", "kl_all_tokens")
        assert [[row[name] for name in figures] for row in rows] == [[0.0] * 4] * 2
    else:
        assert all(moved) and rows[0]["signal_share"] > 0
    if grpo:
        # Of each eight right answers 4, under the leash and without it: all end by EOS.
        assert rows[0]["reward_mean"] == 0.5 and rows[0]["groups_without_signal"] == 0
        assert rows[1]["kl_to_base"] > rows[0]["kl_to_base"] == pytest.approx(0.0, abs=1e-6)


def test_a_checker_changes_no_update_of_an_arm_without_a_critic(make_run: Callable[..., Run]) -> None:
    with_checker, without = (make_run("--run.name", name, "--run.arm", "refsol") for name in ("checked", "bare"))
    for run, checker in ((with_checker, exact_critique), (without, None)):
        run.publish(0)
        run.train("--trainer.steps", "1", checker=checker)
    ours, theirs = with_checker.rows()[0], without.rows()[0]
    by_group = {name for name in ours if name.startswith("advantage_")}
    assert all(ours[name] is not None and theirs[name] is None for name in by_group)
    assert {k: v for k, v in ours.items() if k not in by_group} == {
        k: v for k, v in theirs.items() if k not in by_group
    }
    assert with_checker.store.published[-1].sha256 == without.store.published[-1].sha256
