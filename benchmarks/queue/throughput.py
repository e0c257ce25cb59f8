"""Entries published and consumed a second, on bytes that are encoded already, beside bare redis-py pipelines.

The same server, the same bytes, the same asyncio client, as many entries in a round trip: a pipeline of the peer
sends as many as a group of the queue holds, and reads as many as a claim. The peer does nothing else: XADD, XREADGROUP,
XACK and XDEL. The queue also refuses groups that do not fit or were there before, looks for entries of silent
consumers, and counts. All take turns in every round, each with a stream of its own.

Beside it stand groups of one, where a pipeline saves the peer nothing, and a peer that is free to send more at once
than a group, which shows the cost of keeping groups whole.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from redis.asyncio import Redis

from stepalign_run.config import QueueSection
from stepalign_run.queue import RedisRolloutQueue
from stepalign_run.queue.base import Delivery
from stepalign_run.queue.claiming import RawEntry
from stepalign_run.redis.connection import run_key


@dataclass(frozen=True)
class ThroughputSettings:
    rounds: int = 9
    entries: int = 2048
    group: int = 8
    batch: int = 32
    deep_pipeline: int = 64


@dataclass(frozen=True)
class Side:
    """Entries a second."""

    publish: float
    consume: float


@dataclass(frozen=True)
class Throughput:
    ours: list[Side]
    bare: list[Side]
    ours_group_1: list[Side]
    bare_group_1: list[Side]
    bare_deep: list[Side]
    payload_bytes: float
    memory_factor: float
    """Growth of the server's memory with a full queue ÷ (its capacity × the payload)."""

    @property
    def publish_ratio(self) -> float:
        return _publish_ratio(self.ours, self.bare)

    @property
    def publish_ratio_group_1(self) -> float:
        """Groups of one rollout."""
        return _publish_ratio(self.ours_group_1, self.bare_group_1)

    @property
    def publish_ratio_deep_peer(self) -> float:
        """Groups as usual beside a peer that sends more at once."""
        return _publish_ratio(self.ours, self.bare_deep)

    @property
    def consume_ratio(self) -> float:
        return statistics.median(our.consume / bare.consume for our, bare in zip(self.ours, self.bare, strict=True))

    @property
    def seconds_per_entry(self) -> float:
        """The queue's time to publish and consume one entry."""
        return statistics.median(1 / our.publish + 1 / our.consume for our in self.ours)


_Contender = Callable[[str, Sequence[bytes], int, int], Awaitable[Side]]
"""Of an address, payloads, how many are published at once, and how many are consumed at once."""


class EncodedQueue(RedisRolloutQueue):
    """The queue without its codec: bytes are admitted as they are, and nothing is decoded."""

    async def _accept(self, entries: Sequence[RawEntry], found: dict[str, Delivery]) -> int:
        found.update({entry.entry_id: entry for entry in entries})  # type: ignore[misc]
        return 0


async def measure_throughput(url: str, payloads: Sequence[bytes], settings: ThroughputSettings) -> Throughput:
    """``payloads`` are the bytes of ``settings.entries`` rollouts."""
    contenders: dict[str, tuple[_Contender, int]] = {
        "ours": (_ours, settings.group),
        "bare": (_bare, settings.group),
        "ours_group_1": (_ours, 1),
        "bare_group_1": (_bare, 1),
        "bare_deep": (_bare, settings.deep_pipeline),
    }
    sides: dict[str, list[Side]] = {name: [] for name in contenders}
    await _ours(url, payloads, settings.group, settings.batch)
    for number in range(settings.rounds):
        # The first one of a round comes last in the next.
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            contender, group = contenders[name]
            sides[name].append(await contender(url, payloads, group, settings.batch))
    size = statistics.fmean(map(len, payloads))
    return Throughput(**sides, payload_bytes=size, memory_factor=await _memory_factor(url, payloads, settings))


def _publish_ratio(ours: Sequence[Side], bare: Sequence[Side]) -> float:
    return statistics.median(our.publish / peer.publish for our, peer in zip(ours, bare, strict=True))


def _named(payloads: Sequence[bytes], size: int) -> list[dict[str, bytes]]:
    """Groups by new rollout ids: the queue refuses those that it knows."""
    run = uuid4().hex
    pairs = [(f"{run}/{number}", payload) for number, payload in enumerate(payloads)]
    return [dict(pairs[start : start + size]) for start in range(0, len(pairs), size)]


async def _ours(url: str, payloads: Sequence[bytes], size: int, batch: int) -> Side:
    run = f"bench-{uuid4().hex}"
    queue = EncodedQueue(url, run, "trainer", QueueSection(redis_url=url, capacity=len(payloads)))
    await queue.start()
    groups = _named(payloads, size)
    begin = time.perf_counter()
    for group in groups:
        await queue.admit(group)
    published = time.perf_counter()
    consumed = 0
    while consumed < len(payloads):
        claimed = await queue.claim(batch, 0.0)
        consumed += await queue.acknowledge({entry.entry_id: "trained" for entry in claimed})
    end = time.perf_counter()
    await queue.close()
    await _forget(url, run)
    return Side(len(payloads) / (published - begin), len(payloads) / (end - published))


async def _bare(url: str, payloads: Sequence[bytes], size: int, batch: int) -> Side:
    stream = f"bare-{uuid4().hex}"
    async with Redis.from_url(url, protocol=2) as redis:
        await redis.xgroup_create(stream, "g", "0", mkstream=True)
        groups = _named(payloads, size)
        begin = time.perf_counter()
        for group in groups:
            pipeline = redis.pipeline(transaction=False)
            for payload in group.values():
                pipeline.xadd(stream, {"rollout": payload})
            await pipeline.execute()
        published = time.perf_counter()
        consumed = 0
        while consumed < len(payloads):
            reply: Any = await redis.xreadgroup("g", "c", {stream: ">"}, count=batch)
            names = [name for name, _ in reply[0][1]]
            pipeline = redis.pipeline(transaction=False)
            pipeline.xack(stream, "g", *names)
            pipeline.xdel(stream, *names)
            consumed += (await pipeline.execute())[1]
        end = time.perf_counter()
        await redis.delete(stream)
    return Side(len(payloads) / (published - begin), len(payloads) / (end - published))


async def _memory_factor(url: str, payloads: Sequence[bytes], settings: ThroughputSettings) -> float:
    """With the trainer away and the queue full to its capacity, a refused group after it."""
    run = f"bench-{uuid4().hex}"
    queue = EncodedQueue(url, run, "trainer", QueueSection(redis_url=url, capacity=len(payloads)))
    async with Redis.from_url(url, protocol=2) as redis:
        before = (await redis.info("memory"))["used_memory"]
        for group in [*_named(payloads, settings.group), *_named(payloads[: settings.group], settings.group)]:
            await queue.admit(group)
        grown = (await redis.info("memory"))["used_memory"] - before
    await queue.close()
    await _forget(url, run)
    return grown / sum(map(len, payloads))


async def _forget(url: str, run: str) -> None:
    async with Redis.from_url(url) as redis:
        await redis.delete(*(run_key(run, name) for name in ("rollouts", "ledger", "seen", "dead")))
