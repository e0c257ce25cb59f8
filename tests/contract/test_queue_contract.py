"""What every rollout queue does, on a real server and in memory."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Protocol

import pytest
import redis

from stepalign_run.config import QueueSection
from stepalign_run.queue import Admission, RedisRolloutQueue, Replay, RolloutQueue
from stepalign_run.queue.codec import decode
from stepalign_run.queue.redis_streams import GROUP
from stepalign_run.rollout import Rollout
from stepalign_run.testing import MemoryBroker, MemoryRolloutQueue

SETTINGS = QueueSection(capacity=8, claim_idle_seconds=60, max_deliveries=2)
Factory = Callable[..., Rollout]


class World(Protocol):
    """A server as a test sees it: it opens queues, lets time pass and does what only strangers would do."""

    def open(self, consumer: str, settings: QueueSection = SETTINGS) -> RolloutQueue: ...

    def let_idle(self, seconds: float) -> None: ...

    def inject(self, payload: bytes) -> str: ...

    def delete(self, entry_id: str) -> None: ...

    def destroy_group(self) -> None: ...


class MemoryWorld:
    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.now = 1000.0
        self.inject, self.delete = self.broker.inject, self.broker.delete
        self.destroy_group = self.broker.destroy_group

    def open(self, consumer: str, settings: QueueSection = SETTINGS) -> RolloutQueue:
        return MemoryRolloutQueue(self.broker, consumer, settings, lambda: self.now)

    def let_idle(self, seconds: float) -> None:
        self.now += seconds


class RedisWorld:
    def __init__(self, url: str) -> None:
        self.url, self.run_id = url, f"contract-{uuid.uuid4().hex}"
        self.stream = f"stepalign:{{{self.run_id}}}:rollouts"
        self.server = redis.Redis.from_url(url)

    def open(self, consumer: str, settings: QueueSection = SETTINGS) -> RolloutQueue:
        return RedisRolloutQueue(self.url, self.run_id, consumer, settings)

    def let_idle(self, seconds: float) -> None:
        """XCLAIM can set how long an entry has been idle, so no test waits."""
        for row in self.server.xpending_range(self.stream, GROUP, "-", "+", 100):
            milliseconds = row["time_since_delivered"] + round(seconds * 1000)
            self.server.xclaim(
                self.stream, GROUP, row["consumer"], 0, [row["message_id"]], idle=milliseconds, justid=True
            )

    def inject(self, payload: bytes) -> str:
        with self.server.pipeline(transaction=True) as step:
            step.hincrby(f"stepalign:{{{self.run_id}}}:ledger", "published", 1)
            step.xadd(self.stream, {"rollout": payload})
            return step.execute()[1].decode()

    def delete(self, entry_id: str) -> None:
        assert self.server.xdel(self.stream, entry_id) == 1

    def destroy_group(self) -> None:
        assert self.server.xgroup_destroy(self.stream, GROUP) == 1


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.redis)])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    if request.param == "memory":
        yield MemoryWorld()
        return
    found = RedisWorld(request.getfixturevalue("redis_server"))
    yield found
    found.server.close()


@pytest.fixture
def group(make_rollout: Factory) -> Callable[..., list[Rollout]]:
    """``group("g", 3)``: the rollouts g.0, g.1 and g.2."""
    return lambda name, size: [make_rollout(group_id=name, rollout_id=f"{name}.{i}") for i in range(size)]


def run(scenario: Callable[..., Awaitable[None]], *queues: RolloutQueue) -> None:
    """Run ``scenario(*queues)`` with the queues started, and close them."""

    async def body() -> None:
        for queue in queues:
            await queue.start()
        try:
            await scenario(*queues)
        finally:
            for queue in queues:
                await queue.close()

    asyncio.run(body())


def test_rollouts_arrive_whole_in_the_order_of_publication(world: World, group) -> None:
    async def scenario(queue: RolloutQueue) -> None:
        first, second = group("a", 2), group("b", 3)
        assert await queue.publish(first) is Admission.ADMITTED
        assert await queue.publish(second) is Admission.ADMITTED
        deliveries = [*await queue.claim(4, 0), *await queue.claim(4, 0)]
        assert [delivery.rollout for delivery in deliveries] == first + second
        assert [delivery.deliveries for delivery in deliveries] == [1] * 5

    run(scenario, world.open("c"))


def test_a_group_that_does_not_fit_is_refused_whole(world: World, group) -> None:
    async def scenario(queue: RolloutQueue) -> None:
        await queue.publish(group("a", 5))
        assert await queue.publish(group("b", 4)) is Admission.FULL
        assert (await queue.status()).length == 5
        assert await queue.publish(group("c", 3)) is Admission.ADMITTED
        assert (await queue.status()).published == 8

    run(scenario, world.open("c"))


def test_claimed_entries_fill_the_queue_until_they_are_acknowledged(world: World, group) -> None:
    async def scenario(queue: RolloutQueue) -> None:
        await queue.publish(group("a", 8))
        deliveries = await queue.claim(8, 0)
        assert await queue.publish(group("b", 2)) is Admission.FULL
        await queue.acknowledge({delivery.entry_id: "trained" for delivery in deliveries[:2]})
        assert (await queue.status()).length == 6
        assert await queue.publish(group("b", 2)) is Admission.ADMITTED

    run(scenario, world.open("c"))


def test_a_rollout_seen_before_is_refused_with_its_group_even_when_trained(world: World, group, make_rollout) -> None:
    async def scenario(queue: RolloutQueue) -> None:
        await queue.publish(group("a", 2))
        assert await queue.publish(group("a", 2)) is Admission.DUPLICATE
        await queue.acknowledge({delivery.entry_id: "trained" for delivery in await queue.claim(2, 0)})
        mixed = [make_rollout(group_id="a", rollout_id="a.new"), make_rollout(group_id="a", rollout_id="a.0")]
        assert await queue.publish(mixed) is Admission.DUPLICATE
        status = await queue.status()
        assert (status.length, status.published) == (0, 2)
        assert await queue.publish(mixed[:1]) is Admission.ADMITTED

    run(scenario, world.open("c"))


def test_a_retry_into_a_full_queue_is_a_duplicate_and_not_full(world: World, group) -> None:
    async def scenario(queue: RolloutQueue) -> None:
        await queue.publish(group("a", 8))
        assert await queue.publish(group("a", 8)) is Admission.DUPLICATE

    run(scenario, world.open("c"))


def test_groups_that_could_never_be_admitted_raise(world: World, group, make_rollout) -> None:
    async def scenario(queue: RolloutQueue) -> None:
        twins = [make_rollout(), make_rollout()]
        for wrong, message in (
            ([], "at least one"),
            (group("a", 1) + group("b", 1), "share one group_id"),
            (group("a", 9), "queue.capacity"),
            (twins, "twice"),
            ([make_rollout(text="x" * 2000)], "queue.max_entry_bytes"),
        ):
            with pytest.raises(ValueError, match=message):
                await queue.publish(wrong)
        assert (await queue.status()).published == 0

    run(scenario, world.open("c", SETTINGS.model_copy(update={"max_entry_bytes": 1500})))


def test_nothing_is_handed_out_twice_by_one_object(world: World, group) -> None:
    async def scenario(queue: RolloutQueue) -> None:
        await queue.publish(group("a", 2))
        assert len(await queue.claim(8, 0)) == 2
        assert await queue.claim(8, 0) == []
        world.let_idle(61)
        assert await queue.claim(8, 0) == []

    run(scenario, world.open("c"))


def test_two_consumers_share_the_entries(world: World, group) -> None:
    async def scenario(one: RolloutQueue, two: RolloutQueue) -> None:
        await one.publish(group("a", 3))
        mine, others = await one.claim(2, 0), await two.claim(2, 0)
        assert [delivery.rollout.rollout_id for delivery in mine] == ["a.0", "a.1"]
        assert [delivery.rollout.rollout_id for delivery in others] == ["a.2"]

    run(scenario, world.open("one"), world.open("two"))


def test_a_restarted_consumer_gets_its_own_pending_entries_first(world: World, group) -> None:
    async def before(queue: RolloutQueue) -> None:
        await queue.publish(group("a", 3))
        await queue.claim(3, 0)
        await queue.publish(group("b", 2))

    async def after(queue: RolloutQueue) -> None:
        deliveries = [*await queue.claim(2, 0), *await queue.claim(2, 0), *await queue.claim(2, 0)]
        assert [delivery.rollout.rollout_id for delivery in deliveries] == ["a.0", "a.1", "a.2", "b.0", "b.1"]
        assert [delivery.deliveries for delivery in deliveries] == [2, 2, 2, 1, 1]

    run(before, world.open("c"))
    run(after, world.open("c"))


def test_a_silent_consumers_entries_go_to_another(world: World, group) -> None:
    async def scenario(silent: RolloutQueue, other: RolloutQueue) -> None:
        await silent.publish(group("a", 2))
        await silent.claim(2, 0)
        world.let_idle(59)
        assert await other.claim(2, 0) == []
        world.let_idle(2)
        deliveries = [*await other.claim(1, 0), *await other.claim(1, 0)]
        assert [delivery.rollout.rollout_id for delivery in deliveries] == ["a.0", "a.1"]
        assert [delivery.deliveries for delivery in deliveries] == [2, 2]

    run(scenario, world.open("silent"), world.open("other"))


def test_an_idle_entry_is_found_behind_many_that_are_not(world: World, group) -> None:
    async def scenario(slow: RolloutQueue, other: RolloutQueue) -> None:
        await slow.publish(group("a", 40))
        entry_ids = [delivery.entry_id for delivery in await slow.claim(40, 0)]
        world.let_idle(61)
        await slow.heartbeat(entry_ids[:30])
        assert [delivery.rollout.rollout_id for delivery in await other.claim(1, 0)] == ["a.30"]
        assert [delivery.rollout.rollout_id for delivery in await other.claim(2, 0)] == ["a.31", "a.32"]

    large = SETTINGS.model_copy(update={"capacity": 64})
    run(scenario, world.open("slow", large), world.open("other", large))


def test_a_heartbeat_keeps_entries_and_counts_as_no_delivery(world: World, group) -> None:
    async def scenario(slow: RolloutQueue, other: RolloutQueue) -> None:
        await slow.publish(group("a", 2))
        kept, left = await slow.claim(2, 0)
        for _ in range(3):
            world.let_idle(50)
            assert await slow.heartbeat([kept.entry_id]) == {kept.entry_id}
        taken = await other.claim(2, 0)
        assert [delivery.entry_id for delivery in taken] == [left.entry_id]
        world.let_idle(61)
        assert {d.entry_id: d.deliveries for d in await other.claim(2, 0)} == {kept.entry_id: 2}

    run(scenario, world.open("slow"), world.open("other"))


def test_a_heartbeat_takes_nothing_back_from_another_consumer(world: World, group) -> None:
    async def scenario(late: RolloutQueue, other: RolloutQueue) -> None:
        await late.publish(group("a", 1))
        (delivery,) = await late.claim(1, 0)
        world.let_idle(61)
        await other.claim(1, 0)
        assert await late.heartbeat([delivery.entry_id]) == frozenset()
        assert await other.heartbeat([delivery.entry_id]) == {delivery.entry_id}
        assert await late.heartbeat([]) == frozenset()

    run(scenario, world.open("late"), world.open("other"))


def test_acknowledging_twice_counts_once_whoever_does_it(world: World, group) -> None:
    async def scenario(late: RolloutQueue, other: RolloutQueue) -> None:
        await late.publish(group("a", 2))
        first, second = (delivery.entry_id for delivery in await late.claim(2, 0))
        world.let_idle(61)
        await other.claim(2, 0)
        assert await late.acknowledge({first: "trained"}) == 1
        assert await other.acknowledge({first: "stale", second: "stale"}) == 1
        assert await late.acknowledge({}) == 0
        status = await late.status()
        assert (status.trained, status.stale, status.length, status.claimed) == (1, 1, 0, 0)

    run(scenario, world.open("late"), world.open("other"))


def test_outcomes_are_counted_by_kind_and_reason(world: World, group) -> None:
    async def scenario(queue: RolloutQueue) -> None:
        await queue.publish(group("a", 5))
        ids = [delivery.entry_id for delivery in await queue.claim(5, 0)]
        outcomes = ["trained", "stale", "skipped:no_answer", "skipped:no_answer", "skipped:truncated"]
        assert await queue.acknowledge(dict(zip(ids, outcomes, strict=True))) == 5
        status = await queue.status()
        assert status.skipped == {"no_answer": 2, "truncated": 1}
        assert (status.trained, status.stale, status.dead) == (1, 1, 0)

    run(scenario, world.open("c"))


def test_an_unknown_outcome_raises_and_acknowledges_nothing(world: World, group) -> None:
    async def scenario(queue: RolloutQueue) -> None:
        await queue.publish(group("a", 2))
        first, second = (delivery.entry_id for delivery in await queue.claim(2, 0))
        for wrong in ("lost", "skipped:", "published"):
            with pytest.raises(ValueError, match="outcome"):
                await queue.acknowledge({first: "trained", second: wrong})
        assert (await queue.status()).claimed == 2

    run(scenario, world.open("c"))


def test_a_corrupt_entry_goes_to_the_dead_letters_with_its_payload(world: World, group) -> None:
    corrupt = b'{"schema_version": 1, \xff'

    async def scenario(queue: RolloutQueue) -> None:
        entry_id = world.inject(corrupt)
        await queue.publish(group("a", 1))
        # One claim of one: the corrupt entry costs no place.
        assert [delivery.rollout.rollout_id for delivery in await queue.claim(1, 0)] == ["a.0"]
        (letter,) = await queue.dead_letters(10)
        assert (letter.entry_id, letter.payload) == (entry_id, corrupt)
        assert "not JSON" in letter.reason
        status = await queue.status()
        assert (status.dead, status.dead_letters, status.length, status.balanced) == (1, 1, 1, True)

    run(scenario, world.open("c"))


def test_an_entry_delivered_too_often_goes_to_the_dead_letters(world: World, group) -> None:
    async def scenario(*queues: RolloutQueue) -> None:
        await queues[0].publish(group("a", 1))
        for queue in queues[:2]:
            assert len(await queue.claim(1, 0)) == 1
            world.let_idle(61)
        assert await queues[2].claim(1, 0) == []
        (letter,) = await queues[2].dead_letters(10)
        assert "delivered 2 times" in letter.reason
        status = await queues[2].status()
        assert (status.dead, status.length, status.claimed, status.balanced) == (1, 0, 0, True)

    run(scenario, *(world.open(name) for name in ("one", "two", "three")))


def test_a_consumer_that_dies_of_an_entry_is_rid_of_it_after_its_restarts(world: World, group) -> None:
    async def publish(queue: RolloutQueue) -> None:
        await queue.publish(group("a", 3))

    async def die(queue: RolloutQueue) -> None:
        assert [d.rollout.rollout_id for d in await queue.claim(1, 0)] == ["a.0"]

    async def die_later(queue: RolloutQueue) -> None:
        await die(queue)
        assert [d.rollout.rollout_id for d in await queue.claim(1, 0)] == ["a.1"]

    async def survive(queue: RolloutQueue) -> None:
        # Its other pending entry still comes before the new one.
        assert [d.rollout.rollout_id for d in await queue.claim(1, 0)] == ["a.1"]
        assert (await queue.status()).dead == 1

    for life in (publish, die, die_later, survive):
        run(life, world.open("c"))


def test_a_caller_can_give_an_entry_up_once(world: World, group) -> None:
    async def scenario(queue: RolloutQueue) -> None:
        await queue.publish(group("a", 2))
        delivery = (await queue.claim(1, 0))[0]
        assert await queue.dead_letter(delivery.entry_id, "no critique in five tries") is True
        assert await queue.dead_letter(delivery.entry_id, "again") is False
        assert [letter.reason for letter in await queue.dead_letters(10)] == ["no critique in five tries"]
        assert (await queue.status()).dead == 1

    run(scenario, world.open("c"))


def test_what_was_published_before_the_first_consumer_came_is_delivered(world: World, group) -> None:
    world.inject(group("a", 1)[0].model_dump_json().encode())

    async def scenario(queue: RolloutQueue) -> None:
        await queue.start()
        assert len(await queue.claim(1, 0)) == 1

    run(scenario, world.open("late"))


def test_a_destroyed_group_is_made_again_and_held_entries_are_not_repeated(world: World, group) -> None:
    async def scenario(holder: RolloutQueue, other: RolloutQueue) -> None:
        await holder.publish(group("a", 3))
        held = await holder.claim(1, 0)
        world.destroy_group()
        assert [d.rollout.rollout_id for d in await holder.claim(3, 0)] == ["a.1", "a.2"]
        world.destroy_group()
        assert await holder.heartbeat([held[0].entry_id]) == frozenset()
        assert len(await other.claim(3, 0)) == 3
        assert await holder.acknowledge({held[0].entry_id: "trained"}) == 1

    run(scenario, world.open("holder"), world.open("other"))


def test_entries_deleted_by_strangers_are_passed_over_and_in_the_balance(world: World, group) -> None:
    async def before(queue: RolloutQueue) -> None:
        await queue.publish(group("a", 3))
        world.delete((await queue.claim(3, 0))[0].entry_id)

    async def after(restarted: RolloutQueue, other: RolloutQueue) -> None:
        delivery = (await restarted.claim(1, 0) or await restarted.claim(1, 0))[0]
        assert delivery.rollout.rollout_id == "a.1"
        world.delete(delivery.entry_id)
        world.let_idle(61)
        assert [d.rollout.rollout_id for d in await other.claim(3, 0)] == ["a.2"]
        status = await other.status()
        assert (status.length, status.claimed, status.balanced) == (1, 1, False)

    run(before, world.open("c"))
    run(after, world.open("c"), world.open("other"))


def test_a_claim_waits_for_entries_and_no_longer_than_it_may(world: World, group) -> None:
    async def scenario(consumer: RolloutQueue, producer: RolloutQueue) -> None:
        async def publish_later() -> None:
            for name in ("a", "b"):
                await asyncio.sleep(0.05)
                await producer.publish(group(name, 1))

        task = asyncio.create_task(publish_later())
        assert [d.rollout.rollout_id for d in await consumer.claim(2, 10)] == ["a.0", "b.0"]
        await task
        started = time.monotonic()
        assert await consumer.claim(1, 0.1) == []
        assert 0.1 <= time.monotonic() - started < 2

    run(scenario, world.open("consumer"), world.open("producer"))


def test_a_claim_that_waits_for_more_keeps_what_it_has(world: World, group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepalign_run.queue.claiming._LONGEST_WAIT_SECONDS", 0.05)

    async def scenario(waiting: RolloutQueue, other: RolloutQueue) -> None:
        await waiting.publish(group("a", 1))
        claim = asyncio.create_task(waiting.claim(2, 1.0))
        for _ in range(2):
            await asyncio.sleep(0.3)
            world.let_idle(50)
        assert await other.claim(1, 0) == []
        assert [d.rollout.rollout_id for d in await claim] == ["a.0"]

    run(scenario, world.open("waiting"), world.open("other"))


def test_a_claim_that_waits_for_more_forgets_what_another_took(world: World, group) -> None:
    async def scenario(waiting: RolloutQueue, other: RolloutQueue) -> None:
        await waiting.publish(group("a", 1))
        claim = asyncio.create_task(waiting.claim(2, 1.1))
        async with asyncio.timeout(10):
            while not (await other.status()).claimed:
                await asyncio.sleep(0.01)
        world.let_idle(61)
        assert len(await other.claim(1, 0)) == 1
        assert await claim == []

    run(scenario, world.open("waiting"), world.open("other"))


def test_a_claim_that_is_cancelled_loses_nothing(world: World, group) -> None:
    async def scenario(queue: RolloutQueue) -> None:
        await queue.publish(group("a", 1))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.claim(2, 30), 0.1)
        world.let_idle(61)
        assert [d.rollout.rollout_id for d in await queue.claim(2, 0)] == ["a.0"]

    run(scenario, world.open("c"))


def test_a_claim_of_nothing_is_refused(world: World) -> None:
    async def scenario(queue: RolloutQueue) -> None:
        with pytest.raises(ValueError, match="count"):
            await queue.claim(0, 1)

    run(scenario, world.open("c"))


def test_the_ledger_balances_at_every_moment(world: World, group) -> None:
    async def scenario(producer: RolloutQueue, consumer: RolloutQueue, reader: RolloutQueue) -> None:
        async def produce() -> None:
            for number in range(25):
                while await producer.publish(group(f"g{number}", 3)) is Admission.FULL:
                    await asyncio.sleep(0.001)
                if number % 5 == 0:
                    world.inject(b"not a rollout")

        async def consume() -> None:
            left = 75
            while left:
                ids = [delivery.entry_id for delivery in await consumer.claim(4, 0.02)]
                outcomes = ("trained", "stale", "skipped:no_answer", "trained")
                left -= await consumer.acknowledge(dict(zip(ids, outcomes, strict=False)))

        work = asyncio.gather(produce(), consume())
        lengths: set[int] = set()
        while not work.done():
            status = await reader.status()
            assert status.balanced
            assert 0 <= status.claimed <= status.length
            lengths.add(status.length)
            await asyncio.sleep(0)
        await work
        await consumer.claim(1, 0)
        status = await reader.status()
        assert len(lengths) > 3
        assert (status.length, status.published, status.dead, status.balanced) == (0, 80, 5, True)

    run(scenario, *(world.open(name) for name in ("producer", "consumer", "reader")))


def test_status_and_dead_letters_need_no_start(world: World) -> None:
    async def look() -> None:
        queue = world.open("reader")
        status = await queue.status()
        assert (status.length, status.published, status.balanced) == (0, 0, True)
        assert await queue.dead_letters(5) == []
        await queue.close()

    asyncio.run(look())


def test_a_dead_letter_is_put_back_once_and_delivered_like_a_new_entry(world: World, group) -> None:
    async def scenario(queue: RolloutQueue) -> None:
        await queue.publish(group("a", 2))
        first, _ = await queue.claim(2, 0)
        await queue.dead_letter(first.entry_id, "for a test")
        assert await queue.replay("1-1") is Replay.GONE
        assert await queue.replay(first.entry_id) is Replay.REPLAYED
        assert await queue.replay(first.entry_id) is Replay.GONE
        status = await queue.status()
        assert (status.published, status.dead, status.dead_letters, status.length) == (2, 0, 0, 2) and status.balanced
        (again,) = await queue.claim(2, 0)
        assert (again.rollout, again.deliveries) == (first.rollout, 1) and again.entry_id != first.entry_id
        # It was admitted before: nobody can publish it a second time.
        assert await queue.publish(group("a", 2)) is Admission.DUPLICATE

    run(scenario, world.open("c"))


def test_a_dead_letter_stays_while_the_queue_is_full(world: World, group) -> None:
    async def scenario(queue: RolloutQueue) -> None:
        await queue.publish(group("a", 1))
        (first,) = await queue.claim(1, 0)
        await queue.dead_letter(first.entry_id, "for a test")
        await queue.publish(group("b", 8))
        assert await queue.replay(first.entry_id) is Replay.FULL
        assert [letter.entry_id for letter in await queue.dead_letters(10)] == [first.entry_id]
        assert (await queue.status()).balanced

    run(scenario, world.open("c"))


def test_queued_work_is_listed_and_acknowledged_whoever_has_claimed_it(world: World, group) -> None:
    async def scenario(queue: RolloutQueue) -> None:
        await queue.publish(group("a", 3))
        (first, *_) = await queue.claim(2, 0)
        entries = await queue.entries()
        assert [decode(payload).rollout_id for payload in entries.values()] == ["a.0", "a.1", "a.2"]
        assert await queue.acknowledge(dict.fromkeys(entries, "skipped:drained")) == 3
        status = await queue.status()
        assert (status.length, status.claimed, status.skipped) == (0, 0, {"drained": 3}) and status.balanced
        assert await queue.acknowledge({first.entry_id: "trained"}) == 0
        assert await queue.entries() == {}

    run(scenario, world.open("c"))
