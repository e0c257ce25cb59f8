"""The rollout queue on a real server against a model of plain sets, by whatever sequence of events Hypothesis finds.

Two consumers claim, die, come back under their names and take over from each other; producers retry; letters die and
are put back; the group vanishes; strangers delete entries. The model says for each claim what it hands out, in what
order and after how many deliveries, and after each step what stands on the server. At every step nothing that was
admitted is lost, nothing acknowledged comes back, and the ledger adds up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from redis import Redis

from stepalign.types import Problem
from stepalign_run.config import QueueSection
from stepalign_run.queue import Admission, RedisRolloutQueue, Replay
from stepalign_run.queue.redis_streams import GROUP
from stepalign_run.redis.connection import run_key
from stepalign_run.rollout import Rollout, SamplingParameters

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


@lru_cache(1000)
def rollout_of(payload: bytes) -> str | None:
    return None if payload == b"no rollout" else Rollout.model_validate_json(payload).rollout_id


def order(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number)


FIRST = "0-0"


@dataclass
class Claimed:
    """An entry that was delivered and not settled; it stays so when it is deleted by others, until that is noticed."""

    owner: str
    deliveries: int = 1
    idle: bool = False


@dataclass
class Life:
    """A consumer from one start to its death."""

    held: set[str] = field(default_factory=set)
    """Handed out to it and not settled by it."""
    recovered: bool = False
    """Whether it was handed all that it had claimed in former lives."""
    cursor: str = FIRST
    """Where it goes on to look for idle entries."""


class QueueModel(RuleBasedStateMachine):
    """``url`` is set by the test."""

    url = ""

    # Hypothesis leaves some rules out of each example: what nothing happens without comes before them.
    @initialize(
        sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3),
        claims=st.lists(st.tuples(st.integers(1, 4), consumers)),
    )
    def begin(self, sizes: list[int], claims: list[tuple[int, str]]) -> None:
        self.loop = asyncio.new_event_loop()
        self.run_id = f"model-{uuid4().hex}"
        self.server = Redis.from_url(self.url)
        self.section = QueueSection(
            redis_url=self.url, capacity=CAPACITY, claim_idle_seconds=3600, max_deliveries=MOST_DELIVERIES
        )
        self.queues = {name: self.opened(name) for name in CONSUMERS}
        self.lives = {name: Life() for name in CONSUMERS}
        self.groups = 0
        self.admitted: set[str] = set()
        self.settled: set[str] = set()
        self.poison = 0
        self.stream: dict[str, str | None] = {}
        """Rollout id by entry id, oldest first, None for poison."""
        self.last_added = FIRST
        self.has_group = True
        self.last_delivered = FIRST
        self.claimed: dict[str, Claimed] = {}
        self.delivered: dict[str, str] = {}
        """Rollout id by entry id, of all that was ever handed out."""
        self.dead: dict[str, tuple[str | None, str]] = {}
        """Rollout id and how the reason begins, by entry id, oldest first."""
        self.deleted: list[str | None] = []
        """Rollout ids of entries that strangers have deleted."""
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

    def added(self, names: list[str] | list[str | None]) -> None:
        """Learn the entry ids of what was just added."""
        rows = self.server.xrange(self.key("rollouts"), f"({self.last_added}")
        entry_ids = [entry_id.decode() for entry_id, _ in rows]
        self.stream.update(zip(entry_ids, names, strict=True))
        self.last_added = entry_ids[-1]

    def group_is_made(self) -> None:
        if not self.has_group:
            self.has_group, self.last_delivered = True, FIRST

    @rule(size=st.integers(1, 4), consumer=consumers)
    def publish(self, size: int, consumer: str) -> None:
        self.groups += 1
        names = [f"{self.groups}.{i}" for i in range(size)]
        admission = self.do(self.queues[consumer].publish([rollout(name, str(self.groups)) for name in names]))
        assert admission is (Admission.ADMITTED if len(self.stream) + size <= CAPACITY else Admission.FULL)
        if admission is Admission.ADMITTED:
            self.admitted.update(names)
            self.added(names)

    @rule(data=st.data())
    def publish_again(self, data: st.DataObject) -> None:
        """A producer that did not hear the answer."""
        if self.admitted:
            name = data.draw(st.sampled_from(sorted(self.admitted)))
            assert self.do(self.queues["one"].publish([rollout(name, "again")])) is Admission.DUPLICATE

    @rule(count=st.integers(1, 4), consumer=consumers)
    def claim(self, count: int, consumer: str) -> None:
        there = self.there_for(consumer)
        # What was handed out to it before may be looked at in place of others, and the search for idle entries goes on
        # where it stopped: then some are left for the next claims, which get them.
        repeats = 1 + len(self.lives[consumer].held) if self.may_fall_short(consumer) else 0
        found = self.claim_once(count, consumer)
        while len(found) < min(count, len(there)) and repeats:
            found += self.claim_once(count - len(found), consumer)
            repeats -= 1
        assert len(found) == min(count, len(there)) and set(found) <= set(there)

    def claim_once(self, count: int, consumer: str) -> list[str]:
        expected = self.handed_out(count, consumer)
        deliveries = self.do(self.queues[consumer].claim(count, 0.0))
        assert [(each.entry_id, each.rollout.rollout_id, each.deliveries) for each in deliveries] == expected
        assert self.settled.isdisjoint(name for _, name, _ in expected)
        self.delivered.update((entry_id, name) for entry_id, name, _ in expected)
        return [entry_id for entry_id, _, _ in expected]

    def there_for(self, consumer: str) -> list[str]:
        """Ids of all that this consumer may be handed, in no order."""
        life = self.lives[consumer]
        there = list[str]()
        for entry_id, name in self.stream.items():
            claimed = self.claimed.get(entry_id)
            if claimed is None:
                free = order(entry_id) > order(self.last_delivered) or not self.has_group
            else:
                own = claimed.owner == consumer and not life.recovered
                free = (own or claimed.idle) and claimed.deliveries < MOST_DELIVERIES
            if free and name is not None and entry_id not in life.held:
                there.append(entry_id)
        return there

    def may_fall_short(self, consumer: str) -> bool:
        life = self.lives[consumer]
        held = life.held & self.stream.keys()
        in_the_way = [entry_id for entry_id in held if entry_id not in self.claimed or self.claimed[entry_id].idle]
        return bool(in_the_way) or life.cursor != FIRST

    def handed_out(self, count: int, consumer: str) -> list[tuple[str, str, int]]:
        """Entry id, rollout id and deliveries of what a claim hands out: its own, then idle ones, then new ones."""
        life = self.lives[consumer]
        self.group_is_made()
        found: list[tuple[str, str, int]] = []
        own = [entry_id for entry_id, claimed in self.claimed.items() if claimed.owner == consumer]
        for entry_id in sorted([] if life.recovered else own, key=order):
            if len(found) < count and entry_id not in life.held and entry_id in self.stream:
                self.deliver(entry_id, consumer, found)
        life.recovered = life.recovered or len(found) < count
        buried = True
        while buried and len(found) < count:
            looked_at = self.idle_ones(count - len(found), consumer)
            if life.cursor == FIRST:
                new = [entry_id for entry_id in self.stream if order(entry_id) > order(self.last_delivered)]
                looked_at += new[: count - len(found) - len(looked_at)]
            buried = sum([self.deliver(entry_id, consumer, found) for entry_id in looked_at])
        life.held.update(entry_id for entry_id, _, _ in found)
        return found

    def idle_ones(self, count: int, consumer: str) -> list[str]:
        """Ids of entries that nobody gives signs of life for, from where this consumer stopped to look for them.

        Those that strangers have deleted are noticed and forgotten.
        """
        life = self.lives[consumer]
        idle: list[str] = []
        for entry_id in sorted(self.claimed, key=order):
            if order(entry_id) < order(life.cursor):
                continue
            if len(idle) == count:
                life.cursor = entry_id
                return idle
            if entry_id not in self.stream:
                del self.claimed[entry_id]
            elif self.claimed[entry_id].idle:
                idle.append(entry_id)
        life.cursor = FIRST
        return idle

    def deliver(self, entry_id: str, consumer: str, found: list[tuple[str, str, int]]) -> bool:
        """Add to ``found`` what may be handed out; returns whether the entry went to the dead letters instead."""
        deliveries = self.claimed[entry_id].deliveries + 1 if entry_id in self.claimed else 1
        self.claimed[entry_id] = Claimed(consumer, deliveries)
        self.last_delivered = max(self.last_delivered, entry_id, key=order)
        name = self.stream[entry_id]
        if entry_id in self.lives[consumer].held:
            return False
        if deliveries > MOST_DELIVERIES or name is None:
            reason = f"delivered {deliveries - 1} times" if deliveries > MOST_DELIVERIES else ""
            self.let_go([entry_id], consumer)
            self.dead[entry_id] = name, reason
            return True
        found.append((entry_id, name, deliveries))
        return False

    # Chains of the following two, because what it takes to be delivered again and again is seldom found by chance.
    @rule(consumer=consumers, claims=st.lists(st.integers(1, 4), max_size=4))
    def crash(self, consumer: str, claims: list[int]) -> None:
        """Its successor has its name, and what it had claimed."""
        self.restart(consumer)
        for count in claims:
            self.claim(count, consumer)
            self.restart(consumer)

    def restart(self, consumer: str) -> None:
        self.do(self.queues[consumer].close())
        self.queues[consumer] = self.opened(consumer)
        self.lives[consumer] = Life()
        self.group_is_made()

    @rule(claims=st.lists(st.tuples(st.integers(1, 4), consumers), max_size=4))
    def time_passes(self, claims: list[tuple[int, str]]) -> None:
        """Longer than the idle limit: whoever asks first gets what is claimed."""
        self.all_turn_idle()
        for count, consumer in claims:
            self.claim(count, consumer)
            self.all_turn_idle()

    def all_turn_idle(self) -> None:
        for entry_id, claimed in list(self.claimed.items()):
            claim = (self.key("rollouts"), GROUP, claimed.owner, 0, [entry_id])
            self.server.xclaim(*claim, idle=3_600_001, justid=True)
            claimed.idle = True
            if entry_id not in self.stream:  # the server has noticed
                del self.claimed[entry_id]

    @rule(consumer=consumers)
    def heartbeat(self, consumer: str) -> None:
        kept = self.do(self.queues[consumer].heartbeat(sorted(self.delivered)))
        if self.delivered:
            self.group_is_made()
        own = {name for name in self.delivered.keys() & self.claimed if self.claimed[name].owner == consumer}
        assert kept == own & set(self.stream)
        for entry_id in own:
            self.claimed[entry_id].idle = False
            if entry_id not in self.stream:
                del self.claimed[entry_id]

    @rule(data=st.data(), outcome=st.sampled_from(["trained", "stale", "skipped:for_a_test"]), consumer=consumers)
    def acknowledge(self, data: st.DataObject, outcome: str, consumer: str) -> None:
        """What was delivered once, to anyone; also twice, as after a lost reply."""
        if self.delivered:
            any_of_them = st.sampled_from(sorted(self.delivered))
            entry_ids = data.draw(st.lists(any_of_them, min_size=1, max_size=3, unique=True))
            there = [entry_id for entry_id in entry_ids if entry_id in self.stream]
            assert self.do(self.queues[consumer].acknowledge(dict.fromkeys(entry_ids, outcome))) == len(there)
            self.let_go(entry_ids, consumer)
            self.settled.update(self.delivered[entry_id] for entry_id in there)

    @rule(data=st.data(), consumer=consumers)
    def give_up(self, data: st.DataObject, consumer: str) -> None:
        if self.delivered:
            entry_id = data.draw(st.sampled_from(sorted(self.delivered)))
            there = entry_id in self.stream
            assert self.do(self.queues[consumer].dead_letter(entry_id, "for a test")) is there
            if there:
                self.dead[entry_id] = self.delivered[entry_id], "for a test"
            self.let_go([entry_id], consumer)

    def let_go(self, entry_ids: list[str], consumer: str) -> None:
        self.lives[consumer].held.difference_update(entry_ids)
        for entry_id in entry_ids:
            self.claimed.pop(entry_id, None)
            self.stream.pop(entry_id, None)

    @rule()
    def poison_entry(self) -> None:
        with self.server.pipeline(transaction=True) as step:
            step.xadd(self.key("rollouts"), {"rollout": "no rollout"})
            step.hincrby(self.key("ledger"), "published", 1)
            step.execute()
        self.poison += 1
        self.added([None])

    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        if self.dead:
            entry_id = data.draw(st.sampled_from(list(self.dead)))
            full = len(self.stream) >= CAPACITY
            assert self.do(self.queues["one"].replay(entry_id)) is (Replay.FULL if full else Replay.REPLAYED)
            if not full:
                self.added([self.dead.pop(entry_id)[0]])

    @rule()
    def the_group_vanishes(self) -> None:
        self.server.xgroup_destroy(self.key("rollouts"), GROUP)
        self.has_group = False
        self.claimed.clear()

    @rule(data=st.data(), trimmed=st.booleans())
    def a_stranger_deletes(self, data: st.DataObject, trimmed: bool) -> None:
        """Claimed or not; what was claimed stays so until the server notices."""
        if not self.stream:
            return
        if trimmed:
            entry_id = next(iter(self.stream))
            assert self.server.xtrim(self.key("rollouts"), maxlen=len(self.stream) - 1, approximate=False) == 1
        else:
            entry_id = data.draw(st.sampled_from(list(self.stream)))
            assert self.server.xdel(self.key("rollouts"), entry_id) == 1
        self.deleted.append(self.stream.pop(entry_id))

    @invariant()
    def nothing_is_lost_and_the_ledger_adds_up(self) -> None:
        status = self.do(self.queues["two"].status())
        assert status.balanced is not bool(self.deleted)
        settled = status.trained + status.stale + sum(status.skipped.values())
        assert status.published - (settled + status.dead + status.length) == len(self.deleted)
        assert status.published == len(self.admitted) + self.poison
        assert settled == len(self.settled)
        assert (status.length, status.claimed) == (len(self.stream), len(self.claimed))
        assert status.dead == status.dead_letters == len(self.dead)
        kept = [*self.stream.values(), *(name for name, _ in self.dead.values())]
        assert sorted(filter(None, kept)) == sorted(self.admitted - self.settled - set(self.deleted))
        assert {name.decode() for name in self.server.smembers(self.key("seen"))} == self.admitted

    @invariant()
    def the_server_has_what_the_model_has(self) -> None:
        stream = self.server.xrange(self.key("rollouts"))
        assert {entry_id.decode(): rollout_of(fields[b"rollout"]) for entry_id, fields in stream} == self.stream
        letters = self.do(self.queues["one"].dead_letters(100))
        assert {letter.entry_id: rollout_of(letter.payload) for letter in letters} == {
            entry_id: name for entry_id, (name, _) in self.dead.items()
        }
        assert all(letter.reason.startswith(self.dead[letter.entry_id][1]) for letter in letters)
        groups = self.server.xinfo_groups(self.key("rollouts"))
        assert [group["last-delivered-id"].decode() for group in groups] == [self.last_delivered] * self.has_group
        rows = self.server.xpending_range(self.key("rollouts"), GROUP, "-", "+", 100) if groups else []
        assert {
            row["message_id"].decode(): Claimed(
                row["consumer"].decode(), row["times_delivered"], row["time_since_delivered"] >= 3_600_000
            )
            for row in rows
        } == self.claimed

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
            max_examples=80,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
            derandomize=True,
            database=None,
        ),
    )
