"""The training loop with the in-process queue and policy store, on the lab's solver."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from stepalign.errors import CheckpointError, ConfigError, CriticRequestError, QueueUnavailableError
from stepalign.types import CritiqueRequest, CritiqueResponse
from stepalign_run.config import Config
from stepalign_run.policy_store import verify_adapter
from stepalign_run.queue.codec import encode
from stepalign_run.rollout import Rollout
from stepalign_run.testing import MemoryRolloutQueue
from stepalign_trainer.batch.contexts import Contexts
from stepalign_trainer.durable.step_journal import StepJournal
from stepalign_trainer.loop import Trainer
from stepalign_trainer.update.learner import Learner

pytestmark = pytest.mark.slow

Run = Any  # that of conftest.py
BATCH = ["right", "wrong_step", "missing_step", "wrong_answer"]


class CrashingQueue(MemoryRolloutQueue):
    """The real queue; its server goes away at the first acknowledgement."""

    async def acknowledge(self, outcomes: Mapping[str, str]) -> int:
        raise QueueUnavailableError("gone")


class WatchingQueue(MemoryRolloutQueue):
    """The real queue; for each acknowledgement it notes which checkpoints hold all of its entries."""

    checkpoints: Path
    seen: list[tuple[int, list[int]]]

    async def acknowledge(self, outcomes: Mapping[str, str]) -> int:
        holding: list[int] = []
        for path in sorted(self.checkpoints.glob("step-*")):
            state = json.loads((path / "state.json").read_text())
            held = dict(state["settled"].values())
            if outcomes.items() <= held.items():
                holding.append(state["step"])
        self.seen.append((len(outcomes), holding))
        return await super().acknowledge(outcomes)


def test_each_update_publishes_the_next_version_and_settles_its_rollouts(run: Run) -> None:
    run.publish(0)
    run.publish(1)
    run.train()
    assert [policy.version for policy in run.store.published] == [0, 1, 2]
    assert run.store.published[0].path == ""
    for policy in run.store.published:
        verify_adapter(policy)
    assert len({policy.sha256 for policy in run.store.published}) == 3
    assert asyncio.run(run.store.finished())
    status = run.status
    assert (status.published, status.trained, status.length) == (8, 8, 0)
    rows = run.rows()
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["outcomes"] == {"trained": 4} and rows[0]["trained_rollouts"] == 4
    assert rows[0]["critiques"] == {"correct": 1, "incorrect": 2, "unjustified": 1}
    # 32 + 14 + 14 + 31 tokens in scope of 32 + 32 + 25 + 32.
    assert (rows[0]["tokens_in_scope"], rows[0]["tokens"]) == (91, 121)


def test_without_a_context_there_is_nothing_to_learn(run: Run) -> None:
    run.publish(0)
    run.publish(1)
    run.train("--run.arm", "null")
    for row in run.rows():
        assert row["critiques"] == {} and row["loss"] == pytest.approx(0.0, abs=1e-7)
        assert row["grad_norm"] < 1e-4  # rounding
    assert run.status.trained == 8


def test_the_reference_arm_trains_without_a_critic_on_all_tokens(run: Run) -> None:
    run.publish(0)
    run.train("--run.arm", "refsol", "--trainer.steps", "1")
    (row,) = run.rows()
    assert row["loss"] > 0 and row["tokens_in_scope"] == row["tokens"] == 121
    assert row["advantage_at_error"] is None


def test_rollouts_are_acknowledged_once_in_two_checkpoints_or_the_last(run: Run) -> None:
    for version in range(3):
        run.publish(version)
    seen: list[tuple[int, list[int]]] = []

    def prepare(queue: WatchingQueue) -> None:
        queue.checkpoints, queue.seen = run.folder / "checkpoints", seen

    run.train("--trainer.steps", "3", queue_class=WatchingQueue, prepare=prepare)
    assert seen == [(4, [1, 2]), (4, [2, 3]), (4, [3])]
    assert run.status.trained == 12 and run.status.balanced


def test_an_unwritable_checkpoint_acknowledges_and_publishes_nothing(run: Run) -> None:
    run.publish(0)
    run.folder.mkdir(parents=True)
    (run.folder / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="make room, then --resume"):
        run.train()
    assert (run.status.trained, run.status.length) == (0, 4)
    assert [policy.version for policy in run.store.published] == [0]


def test_redelivered_rollouts_keep_their_outcome_and_are_not_trained_again(run: Run) -> None:
    """The process dies between checkpoint and acknowledgement."""
    critic = run.critic(refuse="7 * 7 = 8")
    run.publish(0)
    run.publish(1)
    with pytest.raises(QueueUnavailableError):
        run.train(queue_class=CrashingQueue, critic=critic)
    assert (run.status.length, run.status.trained) == (8, 0)
    rows = run.rows()
    run.train()  # this time the critic would not refuse
    assert run.status.trained == 2 * 3
    assert run.status.skipped == {"critic_refused_prompt_too_long": 2}
    assert run.status.balanced and run.status.length == 0
    assert run.rows() == rows and [row["step"] for row in rows] == [1, 2]
    assert [policy.version for policy in run.store.published] == [0, 1, 2]


@pytest.mark.numeric
def test_a_broken_checkpoint_costs_an_update_that_is_redone_bit_for_bit(run: Run, make_run: Callable[..., Run]) -> None:
    """The one before it has no rollout to itself that the queue has forgotten."""
    whole = make_run("--run.name", "whole")
    for version in range(3):
        for one in (whole, run):
            one.publish(version, BATCH[version:] + BATCH[:version])
    whole.train("--trainer.steps", "3")
    with pytest.raises(QueueUnavailableError):
        run.train("--trainer.steps", "3", queue_class=CrashingQueue)
    (run.folder / "checkpoints" / "step-000002" / "optimizer.pt").write_bytes(b"torn")
    run.train("--trainer.steps", "3")
    assert run.rows() == whole.rows() and len(run.rows()) == 3
    assert run.store.published[-1].sha256 == whole.store.published[-1].sha256
    assert run.status == whole.status and run.status.trained == 12


@pytest.mark.numeric
def test_between_sparse_checkpoints_updates_are_redone_bit_for_bit(run: Run, make_run: Callable[..., Run]) -> None:
    sparse = ("--trainer.steps", "4", "--trainer.checkpoint_every", "2")
    whole = make_run("--run.name", "whole")
    for version in range(4):
        for one in (whole, run):
            one.publish(version, BATCH[version:] + BATCH[:version])
    whole.train(*sparse)

    class Absent(run.critic):
        async def critique(self, request: CritiqueRequest, request_id: str | None = None) -> CritiqueResponse:
            if (request_id or "").startswith("v000003"):
                raise CriticRequestError("no critic", status=404)
            return await super().critique(request, request_id)

    with pytest.raises(CriticRequestError):
        run.train(*sparse, critic=Absent())
    assert [policy.version for policy in run.store.published] == [0, 1, 2, 3]
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == ["step-000002"]
    assert (run.status.length, run.status.trained) == (16, 0)
    run.train(*sparse)
    assert [policy.version for policy in run.store.published] == [0, 1, 2, 3, 2, 3, 4]
    assert run.rows() == whole.rows() and len(run.rows()) == 4
    assert run.store.published[-1].sha256 == whole.store.published[-1].sha256
    assert run.status == whole.status and run.status.trained == 16


def test_a_checkpoint_holds_where_the_run_stands(run: Run) -> None:
    run.publish(0)
    run.publish(1)
    run.train()
    state = json.loads((run.folder / "checkpoints" / "step-000002" / "state.json").read_text())
    assert (state["step"], state["policy_version"], state["settled_total"]) == (2, 2, 8)
    assert {outcome for _, outcome in state["settled"].values()} == {"trained"}
    outcomes = [json.loads(line) for line in (run.folder / "outcomes.jsonl").read_text().splitlines()]
    assert [row["step"] for row in outcomes] == [1, 2]
    assert {name for row in outcomes for name in row["outcomes"]} == state["settled"].keys()


def test_dead_letters_make_a_short_batch_not_a_hang(run: Run) -> None:
    run.broker.inject(b"no rollout")
    run.publish(0, BATCH[:3])
    run.train("--trainer.steps", "1")
    run.publish(1)
    run.train()
    assert [row["rollouts"] for row in run.rows()] == [3, 4]
    assert (run.status.dead, run.status.trained) == (1, 7)


def test_a_batch_of_dead_letters_alone_is_an_empty_update(run: Run) -> None:
    for _ in range(4):
        run.broker.inject(b"no rollout")
    run.publish(0, [])
    run.train("--trainer.steps", "1")
    (row,) = run.rows()
    assert (row["rollouts"], row["loss"], row["trained_rollouts"]) == (0, 0.0, 0)
    assert run.status.dead == 4 and [policy.version for policy in run.store.published] == [0, 1]


def test_a_policy_that_the_server_has_lost_is_published_again(run: Run) -> None:
    """A killed server may come back without its last seconds; the solver then waits for that policy."""
    run.publish(0, BATCH)

    async def work() -> None:
        config = run.make_config("--trainer.steps", "2")
        queue = MemoryRolloutQueue(run.broker, "trainer", config.queue)
        contexts = Contexts(config.arm.context, run.critic(), 4)
        learner = Learner(config, run.tokenizer)
        trainer = Trainer(config, learner, queue, run.store, contexts, StepJournal(config.folder.metrics))
        task = asyncio.create_task(trainer.train())
        async with asyncio.timeout(60):
            first = await run.store.wait_for(1, 0.01)
            run.store.lose()
            assert await run.store.latest() is None
            again = await run.store.wait_for(1, 0.01)
        assert (again.version, again.sha256, again.canary) == (1, first.sha256, first.canary)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(work())


def test_a_batch_that_is_still_being_sampled_is_waited_for(run: Run) -> None:
    run.publish(0, BATCH[:3], whole=False)

    async def work() -> None:
        config = run.make_config("--trainer.steps", "1")
        queue = MemoryRolloutQueue(run.broker, "trainer", config.queue)
        contexts = Contexts(config.arm.context, run.critic(), 4)
        learner = Learner(config, run.tokenizer)
        trainer = Trainer(config, learner, queue, run.store, contexts, StepJournal(config.folder.metrics))
        task = asyncio.create_task(trainer.train())
        await asyncio.sleep(0.3)
        assert not task.done()
        last = run.rollout_of("wrong_answer", rollout_id="v000000/p3/0")
        await MemoryRolloutQueue(run.broker, "solver", config.queue).publish([last])
        async with asyncio.timeout(60):
            await task

    asyncio.run(work())
    assert [row["rollouts"] for row in run.rows()] == [4]


@pytest.mark.numeric
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(run: Run, make_run: Callable[..., Run]) -> None:
    whole = make_run("--run.name", "whole")
    for version in range(3):
        whole.publish(version, BATCH[version:] + BATCH[:version])
    whole.train("--trainer.steps", "3")
    for version in range(2):
        run.publish(version, BATCH[version:] + BATCH[:version])
    run.train("--trainer.steps", "2")
    run.publish(2, BATCH[2:] + BATCH[:2])
    run.train("--trainer.steps", "3")
    assert run.rows() == whole.rows() and len(run.rows()) == 3
    assert [p.sha256 for p in run.store.published if p.version == 3] == [whole.store.published[-1].sha256]
    assert [p.version for p in run.store.published] == [0, 1, 2, 2, 3]


@pytest.mark.numeric
def test_the_order_of_arrival_has_no_influence(
    run: Run, make_run: Callable[..., Run], make_config: Callable[..., Config], rollout_of: Callable[..., Rollout]
) -> None:
    other = make_run("--run.name", "other")
    run.publish(0)
    queue = MemoryRolloutQueue(other.broker, "solver", make_config().queue)
    for i in (2, 0, 3, 1):
        asyncio.run(queue.publish([rollout_of(BATCH[i], rollout_id=f"v000000/p{i}/0")]))
    for one in (run, other):
        one.train("--trainer.steps", "1")
    assert run.rows() == other.rows()
    assert run.store.published[-1].sha256 == other.store.published[-1].sha256


def test_a_rollout_of_another_policy_is_stale(run: Run) -> None:
    """One that is early waits for its policy; when the run ends before, it is stale too."""
    run.publish(7, BATCH[:1], whole=False)
    run.publish(0)
    run.publish(1)
    run.broker.inject(encode(run.rollout_of("right", rollout_id="late", policy_version=0)))
    run.train()
    assert (run.status.stale, run.status.trained) == (2, 8)
    outcomes = [json.loads(line) for line in (run.folder / "outcomes.jsonl").read_text().splitlines()]
    stale = [name for row in outcomes for name, outcome in row["outcomes"].items() if outcome == "stale"]
    assert sorted(stale) == ["late", "v000007/p0/0"]
    assert [row["rollouts"] for row in run.rows()] == [4, 4]


def test_skipped_rollouts_are_counted_under_their_reasons(run: Run) -> None:
    run.publish(0)
    # No critique has fewer than 31 words.
    run.train(
        "--trainer.steps", "1", "--trainer.max_teacher_prompt_tokens", "30", critic=run.critic(refuse="7 * 7 = 8")
    )
    assert run.status.skipped == {"critic_refused_prompt_too_long": 1, "teacher_prompt_too_long": 3}
    (row,) = run.rows()
    assert row["outcomes"] == {"skipped:critic_refused_prompt_too_long": 1, "skipped:teacher_prompt_too_long": 3}
    assert row["trained_rollouts"] == 0 and row["loss"] == 0.0
    assert row["critiques"] == {"correct": 1, "critic_refused_prompt_too_long": 1, "incorrect": 1, "unjustified": 1}


def test_a_run_cannot_go_back_behind_what_it_published(run: Run) -> None:
    """Its rollouts are acknowledged and will not come again; going on would train on nothing."""
    run.publish(0)
    run.publish(1)
    run.train()
    newest = run.folder / "checkpoints" / "step-000002"
    newest.rename(run.folder / "removed")
    with pytest.raises(CheckpointError):
        run.train()


def test_another_configuration_cannot_resume(run: Run) -> None:
    run.publish(0)
    run.train("--trainer.steps", "1")
    with pytest.raises(CheckpointError, match="another arm, seed, configuration"):
        run.train("--trainer.learning_rate", "2e-3")


def test_a_kill_after_the_last_checkpoint_leaves_nothing_pending(run: Run) -> None:
    run.publish(0)
    with pytest.raises(QueueUnavailableError):
        run.train("--trainer.steps", "1", queue_class=CrashingQueue)
    assert run.status.length == 4
    run.train("--trainer.steps", "1")
    assert run.status.length == 0 and run.status.trained == 4 and run.status.balanced
    assert len(run.rows()) == 1


def test_a_model_with_a_merged_adapter_is_refused_before_the_first_update(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rollout is refused by the critic; what the method rests on is checked all the same."""

    def disturbed(self: Learner, *arguments: Any) -> None:
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(0.01)
        check(self, *arguments)

    check = Learner.check_teacher_is_student
    monkeypatch.setattr(Learner, "check_teacher_is_student", disturbed)
    run.publish(0)
    with pytest.raises(ConfigError, match="adapter off"):
        run.train("--trainer.steps", "1", critic=run.critic(refuse="step"))


def test_a_slow_critic_does_not_cost_the_claim(run: Run) -> None:
    """The contexts take twice the idle limit; without a heartbeat another consumer would get the rollouts."""

    class SlowCritic(run.critic):
        async def critique(self, request: CritiqueRequest, request_id: str | None = None) -> CritiqueResponse:
            await asyncio.sleep(1.8)
            rival = MemoryRolloutQueue(run.broker, "rival", run.make_config(*idle).queue)
            taken.extend(await rival.claim(8, 0.0))
            return await super().critique(request, request_id)

    idle = ("--queue.claim_idle_seconds", "0.9")
    taken: list[Any] = []
    run.publish(0)
    run.train("--trainer.steps", "1", *idle, critic=SlowCritic())
    assert taken == [] and run.status.trained == 4
