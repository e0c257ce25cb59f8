"""The rollout queue inside one process and one event loop: the deterministic twin of :mod:`.redis_streams`.

:class:`MemoryBroker` stands for the server and is shared by the queues of all consumers; :class:`MemoryRolloutQueue`
stands for one consumer's connection. Entries are encoded as on Redis, so they can be as broken as there.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stepalign_run.config import QueueSection
from stepalign_run.queue.base import Admission, DeadLetter, QueueStatus, Replay, check_outcomes
from stepalign_run.queue.claiming import ClaimingQueue, RawEntry, report_vanished
from stepalign_run.queue.codec import encode_group
from stepalign_run.rollout import Rollout

Clock = Callable[[], float]
_POLL_SECONDS = 0.005


@dataclass
class _Claim:
    consumer: str
    since: float
    deliveries: int = 0


class MemoryBroker:
    """The stream, its consumer group, the ledger. Every method is one step: none of them awaits.

    ``inject``, ``delete`` and ``destroy_group`` play a stranger with access to the server.
    """

    def __init__(self) -> None:
        self.entries: dict[int, bytes] = {}
        """In order of publication, by number."""
        self.claims: dict[int, _Claim] = {}
        self.ledger: Counter[str] = Counter()
        self.seen: set[str] = set()
        self.dead: list[DeadLetter] = []
        self._added = 0
        self._last_delivered = 0

    def inject(self, payload: bytes) -> str:
        """Add an entry that no producer of ours wrote; it is counted as published."""
        self.ledger["published"] += 1
        return self._add(payload)

    def delete(self, entry_id: str) -> None:
        del self.entries[_number(entry_id)]

    def destroy_group(self) -> None:
        self.claims.clear()
        self._last_delivered = 0

    def admit(self, payloads: Mapping[str, bytes], capacity: int) -> Admission:
        if not self.seen.isdisjoint(payloads):
            return Admission.DUPLICATE
        if len(self.entries) + len(payloads) > capacity:
            return Admission.FULL
        for payload in payloads.values():
            self._add(payload)
        self.seen.update(payloads)
        self.ledger["published"] += len(payloads)
        return Admission.ADMITTED

    def own_pending(self, consumer: str, after: int, count: int, now: float) -> list[RawEntry]:
        own = [n for n, claim in sorted(self.claims.items()) if claim.consumer == consumer and n > after]
        return self._hand_over([n for n in own if n in self.entries][:count], consumer, now)

    def reclaim(self, consumer: str, idle_seconds: float, count: int, now: float) -> list[RawEntry]:
        self._drop_vanished()
        idle = [n for n, claim in sorted(self.claims.items()) if now - claim.since >= idle_seconds]
        return self._hand_over(idle[:count], consumer, now)

    def read_new(self, consumer: str, count: int, now: float) -> list[RawEntry]:
        new = [number for number in self.entries if number > self._last_delivered][:count]
        self._last_delivered = max([self._last_delivered, *new])
        return self._hand_over(new, consumer, now)

    def heartbeat(self, consumer: str, entry_ids: Sequence[str], now: float) -> frozenset[str]:
        kept: set[str] = set()
        for entry_id in entry_ids:
            claim = self.claims.get(_number(entry_id))
            if claim is not None and claim.consumer == consumer:
                claim.since = now
                kept.add(entry_id)
        return frozenset(kept)

    def acknowledge(self, entry_id: str, outcome: str) -> bytes | None:
        """Remove an entry and count it. Returns its payload, or None when it is not there any more."""
        self.claims.pop(_number(entry_id), None)
        payload = self.entries.pop(_number(entry_id), None)
        if payload is not None:
            self.ledger[outcome] += 1
        return payload

    def replay(self, entry_id: str, capacity: int) -> Replay:
        letter = next((letter for letter in self.dead if letter.entry_id == entry_id), None)
        if letter is None:
            return Replay.GONE
        if len(self.entries) >= capacity:
            return Replay.FULL
        self._add(letter.payload)
        self.dead.remove(letter)
        self.ledger["dead"] -= 1
        return Replay.REPLAYED

    def status(self) -> QueueStatus:
        return QueueStatus.from_ledger(
            self.ledger, length=len(self.entries), claimed=len(self.claims), dead_letters=len(self.dead)
        )

    def _add(self, payload: bytes) -> str:
        self._added += 1
        self.entries[self._added] = payload
        return _entry_id(self._added)

    def _drop_vanished(self) -> None:
        gone = sorted(self.claims.keys() - self.entries.keys())
        for number in gone:
            del self.claims[number]
        report_vanished([_entry_id(number) for number in gone])

    def _hand_over(self, numbers: Sequence[int], consumer: str, now: float) -> list[RawEntry]:
        for number in numbers:
            claim = self.claims.setdefault(number, _Claim(consumer, now))
            claim.consumer, claim.since = consumer, now
            claim.deliveries += 1
        return [RawEntry(_entry_id(n), self.entries[n], self.claims[n].deliveries) for n in numbers]


class MemoryRolloutQueue(ClaimingQueue):
    """One consumer of a broker. ``clock`` gives the seconds by which entries are idle; waiting takes real time."""

    def __init__(
        self, broker: MemoryBroker, consumer: str, settings: QueueSection, clock: Clock = time.monotonic
    ) -> None:
        super().__init__(settings)
        self._broker = broker
        self._consumer = consumer
        self._clock = clock
        self._own_cursor: int | None = 0

    async def start(self) -> None:
        """Nothing to connect to; the broker's group exists from the beginning."""

    async def close(self) -> None:
        """Nothing to disconnect from."""

    async def publish(self, group: Sequence[Rollout]) -> Admission:
        capacity = self._settings.capacity
        return self._broker.admit(encode_group(group, capacity, self._settings.max_entry_bytes), capacity)

    async def heartbeat(self, entry_ids: Sequence[str]) -> frozenset[str]:
        return self._broker.heartbeat(self._consumer, entry_ids, self._clock())

    async def acknowledge(self, outcomes: Mapping[str, str]) -> int:
        check_outcomes(outcomes.values())
        payloads = [self._broker.acknowledge(entry_id, outcome) for entry_id, outcome in outcomes.items()]
        self._held.difference_update(outcomes)
        return sum(payload is not None for payload in payloads)

    async def dead_letter(self, entry_id: str, reason: str) -> bool:
        payload = self._broker.acknowledge(entry_id, "dead")
        self._held.discard(entry_id)
        if payload is None:
            return False
        self._broker.dead.append(DeadLetter(entry_id, reason, payload))
        return True

    async def status(self) -> QueueStatus:
        return self._broker.status()

    async def dead_letters(self, count: int) -> list[DeadLetter]:
        return self._broker.dead[:count]

    async def replay(self, entry_id: str) -> Replay:
        return self._broker.replay(entry_id, self._settings.capacity)

    async def entries(self) -> dict[str, bytes]:
        return {_entry_id(number): payload for number, payload in self._broker.entries.items()}

    async def _own_pending(self, count: int) -> list[RawEntry]:
        if self._own_cursor is None:
            return []
        entries = self._broker.own_pending(self._consumer, self._own_cursor, count, self._clock())
        self._own_cursor = _number(entries[-1].entry_id) if len(entries) == count else None
        return entries

    async def _available(self, count: int) -> list[RawEntry]:
        idle = self._broker.reclaim(self._consumer, self._settings.claim_idle_seconds, count, self._clock())
        return idle + self._broker.read_new(self._consumer, count - len(idle), self._clock())

    async def _wait_for_new(self, count: int, wait_seconds: float) -> list[RawEntry]:
        deadline = time.monotonic() + wait_seconds
        while True:
            entries = self._broker.read_new(self._consumer, count, self._clock())
            remaining = deadline - time.monotonic()
            if entries or remaining <= 0:
                return entries
            await asyncio.sleep(min(_POLL_SECONDS, remaining))


def _entry_id(number: int) -> str:
    return f"{number}-0"


def _number(entry_id: str) -> int:
    return int(entry_id.partition("-")[0])
