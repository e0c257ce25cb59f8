"""Values that are not finite: nothing of the update stays, and the run can go on."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stepalign.errors import CheckpointError, NonFiniteError
from stepalign_trainer.batch.examples import Example
from stepalign_trainer.loop import Trainer
from stepalign_trainer.update.learner import Learner

pytestmark = pytest.mark.slow

Run = Any  # that of conftest.py
STEPS = ("--trainer.steps", "3")


def break_model(learner: Learner) -> None:
    with torch.no_grad():
        learner.model.get_base_model().model.norm.weight[0] = torch.nan


def break_before(trainer: Trainer, update: int) -> None:
    """The model breaks while the contexts of this update are made."""
    fetch = trainer.contexts.fetch

    async def breaking(rollouts: Any) -> Any:
        if trainer.step == update - 1:
            break_model(trainer.learner)
        return await fetch(rollouts)

    trainer.contexts.fetch = breaking  # type: ignore[method-assign]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("update", [1, 2, 3])
def test_a_run_that_stops_on_nan_says_so_keeps_its_rollouts_and_goes_on(
    run: Run, make_run: Callable[..., Run], update: int
) -> None:
    """Update 1 is checked and shown token by token, 2 is an ordinary one, 3 is shown again."""
    whole = make_run("--run.name", "whole")
    for one in (run, whole):
        for version in range(3):
            one.publish(version)
    whole.train(*STEPS)
    trainer = run.trainer(*STEPS)
    break_before(trainer, update)
    kept: dict[str, str] = {}

    def stopped(*arguments: Any) -> NonFiniteError:
        kept.update(digests(run.folder / "checkpoints"))
        return stopped_by(*arguments)

    stopped_by = trainer._stopped_by
    trainer._stopped_by = stopped  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=f"update {update} was not applied") as caught:
        run.finish(trainer)

    failure = json.loads((run.folder / "failure.json").read_text())
    assert failure.keys() == {"update", "reason", "last_good_step", "at", "message"}
    assert (failure["update"], failure["last_good_step"]) == (update, update - 1)
    assert "not finite" in failure["reason"] and failure["message"] == str(caught.value)
    assert abs(failure["at"] - time.time()) < 60
    assert digests(run.folder / "checkpoints") == kept
    assert all(path.startswith(f"step-00000{update - 1}") or update == 3 for path in kept)
    assert (update == 1) == (kept == {})
    assert [policy.version for policy in run.store.published] == list(range(update))
    # The newest checkpoint's rollouts are still in the queue, beside those of the update that was not applied.
    trained = 4 * max(0, update - 2)
    assert (run.status.trained, run.status.length) == (trained, 12 - trained)
    assert not asyncio.run(run.store.finished())

    run.train(*STEPS)
    assert not (run.folder / "failure.json").exists()
    assert run.rows() == whole.rows() and run.status.trained == 12 and run.status.balanced
    assert run.rows("tokens.jsonl") == whole.rows("tokens.jsonl")
    assert run.store.published[-1].sha256 == whole.store.published[-1].sha256


def test_a_run_that_cannot_go_on_keeps_the_report_of_what_stopped_it(run: Run) -> None:
    run.publish(0)
    trainer = run.trainer()
    break_before(trainer, 1)
    with pytest.raises(NonFiniteError):
        run.finish(trainer)
    with pytest.raises(CheckpointError, match="another arm, seed, configuration"):
        run.train("--trainer.learning_rate", "2e-3")
    assert (run.folder / "failure.json").exists()


def state_of(learner: Learner) -> list[torch.Tensor]:
    """Adapter weights and the optimizer's moments and counters."""
    moments = learner.optimizer.state_dict()["state"]
    values = [moments[i][key] for i in sorted(moments) for key in ("step", "exp_avg", "exp_avg_sq")]
    return [value.detach().clone() for value in [*learner.parameters, *values]]


@pytest.mark.parametrize("updates_before", [0, 1])
def test_a_second_iteration_that_fails_takes_the_first_one_back(
    make_learner: Callable[..., Learner], examples: list[Example], updates_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--run.arm", "grpo", "--trainer.batch", "8", "--arm.grpo.num_iterations", "2")
    learner = make_learner(*options)
    batch = [replace(example, advantage=1.0 if i % 2 else -1.0) for i, example in enumerate(examples)]
    for _ in range(updates_before):
        learner.update(batch)
    before = state_of(learner)
    after_first_step: list[torch.Tensor] = []
    step = learner._step

    def step_then_break() -> float:
        norm = step()
        after_first_step.extend(state_of(learner))
        break_model(learner)
        return norm

    monkeypatch.setattr(learner, "_step", step_then_break)
    with pytest.raises(NonFiniteError, match="in one of the rollouts r0, r0"):
        learner.update(batch)
    assert not all(map(torch.equal, after_first_step, before))  # the first iteration had changed them
    after = state_of(learner)
    assert len(after) == len(before) and all(map(torch.equal, after, before))


def test_a_gradient_that_is_not_finite_is_not_applied(
    make_learner: Callable[..., Learner], examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_learner()
    learner.update(examples)
    before = state_of(learner)
    accumulate = learner._accumulate_all

    def overflowing(*arguments: Any) -> Any:
        result = accumulate(*arguments)
        gradient = learner.parameters[0].grad
        assert gradient is not None
        gradient[0, 0] = torch.inf
        return result

    monkeypatch.setattr(learner, "_accumulate_all", overflowing)
    with pytest.raises(NonFiniteError, match="the gradient is not finite"):
        learner.update(examples)
    assert all(map(torch.equal, state_of(learner), before))


def test_a_policy_that_diverges_in_the_step_itself_is_not_handed_on(run: Run) -> None:
    """Loss and gradient are finite; the weights after the step are too large for a forward pass."""
    run.publish(0)
    trainer = run.trainer("--trainer.steps", "1", "--run.arm", "stepalign")
    trainer.learner.optimizer.param_groups[0]["lr"] = 3e30
    before = [parameter.clone() for parameter in trainer.learner.parameters]
    with pytest.raises(NonFiniteError, match="the policy after the update is not finite"):
        run.finish(trainer)
    assert all(torch.equal(a, b) for a, b in zip(trainer.learner.parameters, before, strict=True))
    assert json.loads((run.folder / "failure.json").read_text())["last_good_step"] == 0
    assert not list(run.folder.glob("checkpoints/*")) and not list(run.folder.glob("adapters/v*"))
    assert run.status.length == 4
