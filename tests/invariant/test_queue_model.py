"""The rollout queue on a real server against a model of plain sets, by whatever sequence of events Hypothesis finds.

Two consumers claim, die, come back under their names and take over from each other; producers retry; letters die and
are put back; the group vanishes; strangers delete entries. At every step nothing that was admitted is lost, nothing
acknowledged comes back, the ledger adds up, and a claim gets whatever there is for it, in the queue's order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from redis import Redis

from stepalign.config import QueueSection
from stepalign.queue import Admission, RedisRolloutQueue, Replay
from stepalign.queue.connection import run_key
from stepalign.queue.redis_streams import GROUP
from stepalign.types import Problem, Rollout, SamplingParameters

pytestmark = [pytest.mark.redis, pytest.mark.slow]

T = TypeVar("T")
CAPACITY, MOST_DELIVERIES = 6, 3
CONSUMERS = ("one", "two")
consumers = st.sampled_from(CONSUMERS)


def rollout(rollout_id: str, group_id: str) -> Rollout:
    return Rollout(
        run_id="model",
        rollout_id=rollout_id,
        group_id=group_id,
        problem=Problem(id="p", question="1 + 1", answer="2"),
        policy_version=0,
        prompt_token_ids=[1],
        completion_token_ids=[2],
        text="2",
        finish_reason="stop",
        sampling=SamplingParameters(temperature=1.0, max_new_tokens=4, seed=0),
    )


def is_poison(fields: Mapping[bytes, bytes]) -> bool:
    return fields[b"rollout"] == b"no rollout"


def order(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number)


class QueueModel(RuleBasedStateMachine):
    """``url`` is set by the test."""

    url = ""

    # Hypothesis leaves some rules out of each example: what nothing happens without comes before them.
    @initialize(sizes=st.lists(st.integers(1, 3), max_size=3), claims=st.lists(st.tuples(st.integers(1, 4), consumers)))
    def begin(self, sizes: list[int], claims: list[tuple[int, str]]) -> None:
        self.loop = asyncio.new_event_loop()
        self.run_id = f"model-{uuid4().hex}"
        self.server = Redis.from_url(self.url)
        self.section = QueueSection(
            redis_url=self.url, capacity=CAPACITY, claim_idle_seconds=3600, max_deliveries=MOST_DELIVERIES
        )
        self.queues = {name: self.opened(name) for name in CONSUMERS}
        self.groups = 0
        self.admitted: set[str] = set()
        self.settled: set[str] = set()
        self.poison = 0
        self.entries: dict[str, str] = {}
        """Rollout id by entry id, of all that was ever delivered."""
        self.held: dict[str, set[str]] = {name: set() for name in CONSUMERS}
        """What each consumer was handed in its present life and has not settled."""
        self.deleted: list[str | None] = []
        """Rollout ids of entries that strangers have deleted, None for poison."""
        for size in sizes:
            self.publish(size, "one")
        for count, consumer in claims:
            self.claim(count, consumer)

    def opened(self, name: str) -> RedisRolloutQueue:
        queue = RedisRolloutQueue(self.url, self.run_id, name, self.section)
        self.do(queue.start())
        return queue

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def key(self, name: str) -> str:
        return run_key(self.run_id, name)

    @rule(size=st.integers(1, 4), consumer=consumers)
    def publish(self, size: int, consumer: str) -> None:
        self.groups += 1
        names = [f"{self.groups}.{i}" for i in range(size)]
        before = self.do(self.queues[consumer].status()).length
        admission = self.do(self.queues[consumer].publish([rollout(name, str(self.groups)) for name in names]))
        assert admission is (Admission.ADMITTED if before + size <= CAPACITY else Admission.FULL)
        if admission is Admission.ADMITTED:
            self.admitted.update(names)

    @rule(data=st.data())
    def publish_again(self, data: st.DataObject) -> None:
        """A producer that did not hear the answer."""
        if self.admitted:
            name = data.draw(st.sampled_from(sorted(self.admitted)))
            assert self.do(self.queues["one"].publish([rollout(name, "again")])) is Admission.DUPLICATE

    @rule(count=st.integers(1, 4), consumer=consumers)
    def claim(self, count: int, consumer: str) -> None:
        expected, in_order = self.available(consumer)
        found = self.claimed(count, consumer)
        # What the consumer holds already may be looked at in place of others: then it has to ask again.
        for _ in range(0 if in_order else 2 * CAPACITY):
            if len(found) < min(count, len(expected)):
                found += self.claimed(count - len(found), consumer)
        assert len(found) == min(count, len(expected)) and set(found) <= set(expected)
        assert not in_order or found == expected[:count]

    def claimed(self, count: int, consumer: str) -> list[str]:
        deliveries = self.do(self.queues[consumer].claim(count, 0.0))
        for delivery in deliveries:
            name = delivery.rollout.rollout_id
            assert name in self.admitted and name not in self.settled
            assert delivery.deliveries <= MOST_DELIVERIES
            assert self.entries.setdefault(delivery.entry_id, name) == name
        names = [delivery.entry_id for delivery in deliveries]
        assert len(set(names)) == len(names) and self.held[consumer].isdisjoint(names)
        self.held[consumer].update(names)
        return names

    def available(self, consumer: str) -> tuple[list[str], bool]:
        """Ids of what a claim has to hand out: own pending entries, idle ones, new ones.

        The order is certain only where no entry that the consumer holds lies in the way, nor the last scan's cursor.
        """
        stream = [name.decode() for name, fields in self.server.xrange(self.key("rollouts"))]
        poison = {name.decode() for name, fields in self.server.xrange(self.key("rollouts")) if is_poison(fields)}
        own, idle, delivered = list[str](), list[str](), set[str]()
        groups = self.server.xinfo_groups(self.key("rollouts")) if self.server.exists(self.key("rollouts")) else []
        last = groups[0]["last-delivered-id"].decode() if groups else "0-0"
        rows = self.server.xpending_range(self.key("rollouts"), GROUP, "-", "+", 100) if groups else []
        for row in rows:
            name = row["message_id"].decode()
            delivered.add(name)
            if name not in stream or name in poison or row["times_delivered"] >= MOST_DELIVERIES:
                continue
            if row["consumer"].decode() == consumer and name not in self.held[consumer]:
                own.append(name)
            elif row["time_since_delivered"] >= 3_600_000:
                idle.append(name)
        new = [name for name in stream if order(name) > order(last) and name not in poison]
        found = [name for name in [*own, *idle, *new] if name not in self.held[consumer]]
        queue = self.queues[consumer]
        in_the_way = self.held[consumer] & ({*idle, *new} if queue._own_cursor is None else set(stream))
        return found, not in_the_way and queue._reclaim_cursor == "0-0"

    @rule(consumer=consumers)
    def crash(self, consumer: str) -> None:
        """Its successor has its name, and what it had claimed."""
        self.do(self.queues[consumer].close())
        self.queues[consumer] = self.opened(consumer)
        self.held[consumer] = set()

    @rule()
    def time_passes(self) -> None:
        """Longer than the idle limit: whoever asks first gets what is claimed."""
        self.do(self.queues["one"].start())  # the group may have vanished
        for row in self.server.xpending_range(self.key("rollouts"), GROUP, "-", "+", 100):
            claim = (self.key("rollouts"), GROUP, row["consumer"], 0, [row["message_id"]])
            self.server.xclaim(*claim, idle=3_600_001, justid=True)

    @rule(consumer=consumers)
    def heartbeat(self, consumer: str) -> None:
        self.do(self.queues[consumer].start())
        kept = self.do(self.queues[consumer].heartbeat(sorted(self.entries)))
        pending = self.server.xpending_range(self.key("rollouts"), GROUP, "-", "+", 100, consumer)
        assert kept == {row["message_id"].decode() for row in pending} & self.entries.keys()

    @rule(data=st.data(), outcome=st.sampled_from(["trained", "stale", "skipped:for_a_test"]), consumer=consumers)
    def acknowledge(self, data: st.DataObject, outcome: str, consumer: str) -> None:
        """What was delivered once, to anyone; also twice, as after a lost reply."""
        if self.entries:
            names = data.draw(st.lists(st.sampled_from(sorted(self.entries)), min_size=1, max_size=3, unique=True))
            there = {name for name in names if self.server.xrange(self.key("rollouts"), name, name)}
            assert self.do(self.queues[consumer].acknowledge(dict.fromkeys(names, outcome))) == len(there)
            self.held[consumer].difference_update(names)
            self.settled |= {self.entries[name] for name in there}

    @rule(data=st.data(), consumer=consumers)
    def give_up(self, data: st.DataObject, consumer: str) -> None:
        if self.entries:
            name = data.draw(st.sampled_from(sorted(self.entries)))
            there = bool(self.server.xrange(self.key("rollouts"), name, name))
            assert self.do(self.queues[consumer].dead_letter(name, "for a test")) is there
            self.held[consumer].discard(name)

    @rule()
    def poison_entry(self) -> None:
        with self.server.pipeline(transaction=True) as step:
            step.xadd(self.key("rollouts"), {"rollout": "no rollout"})
            step.hincrby(self.key("ledger"), "published", 1)
            step.execute()
        self.poison += 1

    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        queue = self.queues["one"]
        letters = self.do(queue.dead_letters(100))
        if letters:
            letter = data.draw(st.sampled_from(letters))
            full = self.do(queue.status()).length >= CAPACITY
            assert self.do(queue.replay(letter.entry_id)) is (Replay.FULL if full else Replay.REPLAYED)

    @rule()
    def the_group_vanishes(self) -> None:
        self.server.xgroup_destroy(self.key("rollouts"), GROUP)

    @rule(data=st.data(), trimmed=st.booleans())
    def a_stranger_deletes(self, data: st.DataObject, trimmed: bool) -> None:
        stream = self.server.xrange(self.key("rollouts"))
        if not stream:
            return
        taken = stream[:1] if trimmed else [data.draw(st.sampled_from(stream))]
        if trimmed:
            self.server.xtrim(self.key("rollouts"), maxlen=len(stream) - 1, approximate=False)
        else:
            self.server.xdel(self.key("rollouts"), taken[0][0])
        ((_, fields),) = taken
        poison = is_poison(fields)
        self.deleted.append(None if poison else Rollout.model_validate_json(fields[b"rollout"]).rollout_id)

    @invariant()
    def nothing_is_lost_and_the_ledger_adds_up(self) -> None:
        status = self.do(self.queues["two"].status())
        assert status.balanced is not bool(self.deleted)
        accounted = status.trained + status.stale + sum(status.skipped.values()) + status.dead + status.length
        assert status.published - accounted == len(self.deleted)
        assert status.published == len(self.admitted) + self.poison
        assert status.trained + status.stale + sum(status.skipped.values()) == len(self.settled)
        kept = [fields[b"rollout"] for _, fields in self.server.xrange(self.key("rollouts"))]
        kept += [fields[b"payload"] for _, fields in self.server.xrange(self.key("dead"))]
        decoded = [Rollout.model_validate_json(payload).rollout_id for payload in kept if payload != b"no rollout"]
        assert sorted(decoded) == sorted(self.admitted - self.settled - set(self.deleted))
        assert {name.decode() for name in self.server.smembers(self.key("seen"))} == self.admitted

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        for queue in self.queues.values():
            self.do(queue.close())
        keys = [self.key(name) for name in ("rollouts", "ledger", "seen", "dead")]
        self.server.delete(*keys)
        self.server.close()
        self.loop.close()


def test_the_queue_is_its_model(redis_server: str) -> None:
    QueueModel.url = redis_server
    run_state_machine_as_test(
        QueueModel,
        settings=settings(
            max_examples=200,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
            derandomize=True,
            database=None,
        ),
    )
