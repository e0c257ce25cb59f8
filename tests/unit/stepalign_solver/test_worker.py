"""The rollout worker with the in-process queue and policy store."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from stepalign.errors import PolicyError, ProblemFileError
from stepalign.problems import load_problems
from stepalign_models.loading import load_policy
from stepalign_models.sampling import Sampler, stable_seed
from stepalign_run.audit import read_records
from stepalign_run.config import Config
from stepalign_run.policy_store import Canary, PolicyVersion
from stepalign_run.queue import Admission, QueueStatus
from stepalign_run.rollout import Rollout
from stepalign_run.testing import MemoryBroker, MemoryPolicyStore, MemoryRolloutQueue
from stepalign_solver import worker as worker_module
from stepalign_solver.worker import RolloutWorker

BASE = PolicyVersion(version=0, path="", sha256="")
CANARY = Canary(prompt_token_ids=[1], completion_token_ids=[2], logprobs=[-1.0])


class Bench:
    """A worker over a shared broker and store; a second bench over the same ones is the restarted worker."""

    def __init__(self, config: Config, tokenizer: Any, broker: MemoryBroker, store: MemoryPolicyStore) -> None:
        self.config = config
        self.broker = broker
        self.queue = MemoryRolloutQueue(broker, "trainer", config.queue)
        self.store = store
        self.loaded: list[Path | None] = []

        def load_sampler(adapter: Path | None) -> Sampler:
            self.loaded.append(adapter)
            return Sampler(load_policy(config.model, adapter, merge=True), tokenizer)

        problems = load_problems(config.data.train)
        queue = MemoryRolloutQueue(broker, "solver", config.queue)
        self.worker = RolloutWorker(config, queue, store, problems, tokenizer, load_sampler)

    async def until(self, condition: Callable[[QueueStatus], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition(await self.queue.status()):
                await asyncio.sleep(0.005)

    async def take(self, count: int) -> list[Rollout]:
        deliveries = await self.queue.claim(count, 0.0)
        await self.queue.acknowledge({d.entry_id: "trained" for d in deliveries})
        return [d.rollout for d in deliveries]


MakeBench = Callable[..., Bench]


@pytest.fixture
def make_bench(make_config: Callable[..., Config], tokenizer: Any) -> MakeBench:
    broker, store = MemoryBroker(), MemoryPolicyStore()
    return lambda *overrides: Bench(make_config(*overrides), tokenizer, broker, store)


def expected_ids(bench: Bench, version: int) -> set[str]:
    draws = bench.worker.schedule.draws(version)
    return {f"v{version:06d}/{draw.problem.id}/{draw.sample}" for draw in draws}


async def with_worker(bench: Bench, work: Callable[[], Awaitable[None]]) -> None:
    """Run ``work`` beside the worker, and wait for the worker to end by itself. An error of either ends both."""
    worker, beside = asyncio.create_task(bench.worker.run()), asyncio.ensure_future(work())
    try:
        async with asyncio.timeout(120):
            await asyncio.gather(worker, beside)
    finally:
        worker.cancel()
        beside.cancel()


def test_each_version_gets_exactly_its_batch(
    make_bench: MakeBench, policy_version: Callable[[int], PolicyVersion]
) -> None:
    bench = make_bench()
    batches: list[list[Rollout]] = []

    async def work() -> None:
        for policy in (BASE, policy_version(1)):
            await bench.store.publish(policy)
            await bench.until(lambda status: status.length == 4)
            await asyncio.sleep(0.05)
            assert (await bench.queue.status()).published == 4 * (policy.version + 1)
            batches.append(await bench.take(8))
        # Version 2 is the last one: nothing is sampled for it.
        await bench.store.publish(policy_version(2))
        await bench.store.finish()

    asyncio.run(with_worker(bench, work))
    assert [{r.rollout_id for r in batch} for batch in batches] == [expected_ids(bench, 0), expected_ids(bench, 1)]
    assert [{r.policy_version for r in batch} for batch in batches] == [{0}, {1}]
    assert all(r.run_id == "unit" and r.group_id == r.rollout_id for batch in batches for r in batch)
    assert asyncio.run(bench.queue.status()).published == 8
    assert len(bench.loaded) == 2 and bench.loaded[0] is None
    assert asyncio.run(bench.store.last_sampled()) == 1


@pytest.mark.numeric
def test_a_rollout_holds_what_was_sampled_token_by_token(
    make_bench: MakeBench, policy_version: Callable[[int], PolicyVersion], tokenizer: Any
) -> None:
    bench = make_bench()
    policy = policy_version(1)
    asyncio.run(bench.worker.serve(policy))
    sampler = Sampler(load_policy(bench.config.model, Path(policy.path), merge=True), tokenizer)
    rollouts = asyncio.run(bench.take(8))
    assert len(rollouts) == 4
    for rollout in rollouts:
        prompt = f"<bos><user>question : {rollout.problem.question}<assistant>"
        assert rollout.prompt_token_ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        sample = int(rollout.rollout_id.rpartition("/")[2])
        parameters = bench.config.solver.parameters(stable_seed(3, rollout.problem.id, 1, sample))
        assert rollout.sampling == parameters
        again = sampler.sample([rollout.prompt_token_ids], [parameters])[0]
        assert rollout.completion_token_ids == again.token_ids
        assert (rollout.text, rollout.finish_reason) == (again.text, again.finish_reason)
        assert rollout.behaviour_logprobs == pytest.approx(again.logprobs, abs=1e-4)


def test_the_worker_waits_at_a_full_queue_and_goes_on_once_acknowledged(
    make_bench: MakeBench, make_rollout: Callable[..., Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "FULL_WAIT_SECONDS", 0.01)
    bench = make_bench()

    async def work() -> None:
        await bench.queue.publish([make_rollout(rollout_id=f"old{i}") for i in range(6)])
        await bench.store.publish(BASE)
        await bench.until(lambda status: status.length == 8)
        await asyncio.sleep(0.1)
        assert (await bench.queue.status()).published == 8  # six old ones and two of four
        await bench.take(1)
        await bench.until(lambda status: status.published == 9)
        await bench.take(7)
        await bench.until(lambda status: status.published == 10)
        assert {r.rollout_id for r in await bench.take(8)} <= expected_ids(bench, 0)
        await bench.store.publish(PolicyVersion(version=2, path="/unused", sha256="0" * 64, canary=CANARY))
        await bench.store.finish()

    asyncio.run(with_worker(bench, work))


def test_a_restarted_worker_completes_the_batch_without_duplicates(
    make_bench: MakeBench, make_rollout: Callable[..., Rollout]
) -> None:
    first = make_bench()

    async def killed_halfway() -> None:
        await first.queue.publish([make_rollout(rollout_id=f"old{i}") for i in range(6)])
        await first.store.publish(BASE)
        task = asyncio.create_task(first.worker.run())
        await first.until(lambda status: status.length == 8)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert len(await first.take(6)) == 6

    asyncio.run(killed_halfway())
    second = make_bench()
    asyncio.run(second.worker.serve(BASE))
    asyncio.run(second.worker.serve(BASE))
    status = asyncio.run(second.queue.status())
    assert (status.published, status.length) == (10, 4)
    assert {r.rollout_id for r in asyncio.run(second.take(8))} == expected_ids(second, 0)


@pytest.mark.numeric
def test_rollouts_do_not_depend_on_the_sampling_batch(make_bench: MakeBench, make_config: Any, tokenizer: Any) -> None:
    asyncio.run((three := make_bench()).worker.serve(BASE))
    one = Bench(make_config("--solver.batch", "1"), tokenizer, MemoryBroker(), MemoryPolicyStore())
    asyncio.run(one.worker.serve(BASE))
    drawn = [{r.rollout_id: r.completion_token_ids for r in asyncio.run(bench.take(8))} for bench in (three, one)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 4


def test_a_corrupt_adapter_is_refused_before_it_is_loaded(
    make_bench: MakeBench, policy_version: Callable[[int], PolicyVersion]
) -> None:
    bench = make_bench()
    policy = policy_version(1)
    file = Path(policy.path) / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(PolicyError, match="policy version 1"):
        asyncio.run(bench.worker.serve(policy))
    assert bench.loaded == [] and asyncio.run(bench.queue.status()).published == 0


def test_a_prompt_over_the_budget_is_refused_before_anything_is_sampled(make_bench: MakeBench) -> None:
    # "<bos><user>question : 5 + 5 - 1 * 8 + 2<assistant>" are 14 tokens, the other prompts have at most 12.
    make_bench("--solver.max_prompt_tokens", "14")
    with pytest.raises(ProblemFileError, match=r"train\.jsonl was refused") as refused:
        make_bench("--solver.max_prompt_tokens", "13")
    assert [(row.unit, row.number) for row in refused.value.rows] == [("problem", 4)]
    assert "'t3' has 14 tokens, over its budget of 13" in refused.value.rows[0].reason


def test_a_worker_that_starts_before_a_prolonged_runs_trainer_waits_for_it(
    make_bench: MakeBench, policy_version: Callable[[int], PolicyVersion]
) -> None:
    """The store still says "finished" from the shorter run; version 1 of 2 is not the end of this one."""
    bench = make_bench()
    # Before the worker starts, which would read files that are being written.
    first, second = policy_version(1), policy_version(2)

    async def work() -> None:
        await bench.store.publish(first)
        await bench.store.finish()
        await asyncio.sleep(0.05)
        await bench.store.publish(first)  # what the resumed trainer does
        await bench.until(lambda status: status.published == 4)
        await bench.store.publish(second)
        await bench.store.finish()

    asyncio.run(bench.store.publish(first))
    asyncio.run(bench.store.finish())
    asyncio.run(with_worker(bench, work))
    assert asyncio.run(bench.store.last_sampled()) == 1
    assert asyncio.run(bench.queue.status()).published == 4


def test_what_the_server_has_lost_is_published_again(
    make_bench: MakeBench, policy_version: Callable[[int], PolicyVersion]
) -> None:
    """A killed server may come back without its last seconds: here without the batch, and that it was sampled."""
    bench = make_bench()

    async def work() -> None:
        await bench.store.publish(BASE)
        await bench.until(lambda status: status.length == 4)
        await asyncio.sleep(0.05)
        bench.queue = MemoryRolloutQueue(MemoryBroker(), "trainer", bench.config.queue)
        bench.worker.queue = bench.queue
        await bench.store.announce_sampled(-1)
        await bench.until(lambda status: status.length == 4)
        assert {rollout.rollout_id for rollout in await bench.take(8)} == expected_ids(bench, 0)
        await bench.store.publish(policy_version(2))
        await bench.store.finish()

    asyncio.run(with_worker(bench, work))


GROUPS = ("--arm.group_size", "4", "--trainer.batch", "8", "--queue.capacity", "16")


class Admissions(MemoryRolloutQueue):
    """The real queue; it also notes each group that it is offered, and what became of it."""

    offered: list[tuple[list[str], Admission]]

    async def publish(self, group: Sequence[Rollout]) -> Admission:
        admission = await super().publish(group)
        self.offered.append(([rollout.rollout_id for rollout in group], admission))
        return admission


def served(bench: Bench, policy: PolicyVersion = BASE) -> list[tuple[list[str], Admission]]:
    """What the worker offers to the queue for one policy version."""
    queue = Admissions(bench.broker, "solver", bench.config.queue)
    queue.offered = []
    bench.worker.queue = queue
    asyncio.run(bench.worker.serve(policy))
    return queue.offered


@pytest.mark.parametrize("solver_batch", ["3", "8", "5", "1"])
def test_groups_are_published_whole_whatever_is_sampled_together(make_bench: MakeBench, solver_batch: str) -> None:
    bench = make_bench(*GROUPS, "--solver.batch", solver_batch)
    draws = bench.worker.schedule.draws(0)
    first, second = draws[0].problem.id, draws[4].problem.id
    assert first != second
    assert served(bench) == [
        ([f"v000000/{name}/{i}" for i in range(4)], Admission.ADMITTED) for name in (first, second)
    ]
    rollouts = asyncio.run(bench.take(16))
    assert {r.rollout_id.rpartition("/")[0]: r.group_id for r in rollouts} == {
        f"v000000/{name}": f"v000000/{name}/0" for name in (first, second)
    }
    assert len({r.sampling.seed for r in rollouts}) == 8


def test_a_group_of_eight_is_one_admission(make_bench: MakeBench) -> None:
    bench = make_bench("--run.arm", "grpo", "--trainer.batch", "8", "--queue.capacity", "16")
    (group,) = served(bench)
    assert len(group[0]) == 8 and group[1] is Admission.ADMITTED
    assert {r.group_id for r in asyncio.run(bench.take(8))} == {group[0][0]}


def test_a_problem_that_comes_twice_gives_two_groups(make_bench: MakeBench) -> None:
    """Four problems, five groups a batch."""
    bench = make_bench(*GROUPS, "--trainer.batch", "20", "--queue.capacity", "40")
    assert [len(group) for group, _ in served(bench)] == [4] * 5
    rollouts = asyncio.run(bench.take(20))
    assert sorted(Counter(r.group_id for r in rollouts).values()) == [4] * 5
    assert {r.group_id.rpartition("/")[2] for r in rollouts} == {"0", "1"}
    assert len({r.rollout_id for r in rollouts}) == 20


def test_a_restarted_worker_offers_the_same_groups_which_are_refused_whole(make_bench: MakeBench) -> None:
    admitted = served(make_bench(*GROUPS))
    again = served(make_bench(*GROUPS, "--solver.batch", "8"))
    assert again == [(group, Admission.DUPLICATE) for group, _ in admitted]


def test_a_group_that_does_not_fit_is_not_split(
    make_bench: MakeBench, make_rollout: Callable[..., Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine of sixteen places are taken: one group goes in, and three places are too few for the other."""
    monkeypatch.setattr(worker_module, "FULL_WAIT_SECONDS", 0.01)
    bench = make_bench(*GROUPS)

    async def work() -> None:
        await bench.queue.publish([make_rollout(rollout_id=f"old{i}") for i in range(9)])
        task = asyncio.create_task(bench.worker.serve(BASE))
        await bench.until(lambda status: status.length == 13)
        await asyncio.sleep(0.1)
        assert (await bench.queue.status()).length == 13
        await bench.take(1)
        await bench.until(lambda status: status.published == 17)
        await task

    asyncio.run(work())


@pytest.mark.parametrize("loaded", ["another", "none"])
def test_a_model_with_another_adapter_than_the_published_samples_nothing(
    make_bench: MakeBench, policy_version: Callable[[int], PolicyVersion], tokenizer: Any, loaded: str
) -> None:
    """The file is the right one; what the engine serves is not, as with a reused adapter name."""
    bench = make_bench()
    published, other = policy_version(2), policy_version(1)
    wrong = Path(other.path) if loaded == "another" else None
    bench.worker.load_sampler = lambda _: Sampler(load_policy(bench.config.model, wrong, merge=True), tokenizer)
    with pytest.raises(PolicyError, match="version 2: the loaded model gives the canary log-probabilities that differ"):
        asyncio.run(bench.worker.serve(published))
    assert asyncio.run(bench.queue.status()).published == 0


def test_what_was_offered_and_what_became_of_it_is_on_record(make_bench: MakeBench, tmp_path: Path) -> None:
    bench = make_bench("--run.dir", str(tmp_path))
    asyncio.run(bench.worker.serve(BASE))
    # A kill while a row was being written.
    with (tmp_path / bench.config.run.name / "published.jsonl").open("a") as journal:
        journal.write('{"offered": ["v0')
    restarted = make_bench("--run.dir", str(tmp_path))
    asyncio.run(restarted.worker.serve(BASE))
    lines = (bench.config.run_dir / "published.jsonl").read_text().splitlines()
    assert [next(iter(json.loads(line))) for line in lines] == ["offered", "admitted"] * 4 + [
        "offered",
        "duplicate",
    ] * 4
    records = read_records(bench.config.run_dir)
    assert records.offered == records.answered == expected_ids(bench, 0)
