"""The rollout queue on Redis Streams. One stream, one consumer group, a ledger hash; see :mod:`.scripts`.

Keys, all with the run id as hash tag: ``stepalign:{<run_id>}:rollouts``, ``…:ledger``, ``…:seen`` (ids of all rollouts
ever admitted) and ``…:dead``.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from stepalign.errors import UnsupportedServerError
from stepalign_run.config import QueueSection
from stepalign_run.queue import scripts
from stepalign_run.queue.base import Admission, DeadLetter, QueueStatus, Replay, check_outcomes
from stepalign_run.queue.claiming import ClaimingQueue, RawEntry, report_vanished
from stepalign_run.queue.codec import encode_group
from stepalign_run.redis.connection import RedisConnection, ServerReplyError, run_key
from stepalign_run.rollout import Rollout

GROUP = "trainers"
_OLDEST_MAJOR = 7
_FIRST = "0-0"
_T = TypeVar("_T")


class RedisRolloutQueue(ClaimingQueue):
    """The queue of run ``run_id`` for the consumer named ``consumer``.

    A consumer keeps its name over restarts, to find its own pending entries again; no two live ones share a name.
    Entries of a lost reply come back once they are idle, to the first consumer that reclaims them.
    """

    def __init__(self, url: str, run_id: str, consumer: str, settings: QueueSection) -> None:
        super().__init__(settings)
        self._consumer = consumer
        self._stream, self._ledger, self._seen, self._dead = (
            run_key(run_id, name) for name in ("rollouts", "ledger", "seen", "dead")
        )
        self._redis = RedisConnection(url, settings.reconnect_seconds)
        # A pool of its own, so that no other command waits behind a blocking read.
        self._blocking = RedisConnection(url, settings.reconnect_seconds)
        self._own_cursor: str | None = _FIRST
        """Last own pending entry that was read; None once all were."""
        self._reclaim_cursor = _FIRST

    async def start(self) -> None:
        await check_server(self._redis)
        await self._create_group()

    async def close(self) -> None:
        await self._redis.close()
        await self._blocking.close()

    async def publish(self, group: Sequence[Rollout]) -> Admission:
        capacity = self._settings.capacity
        return await self.admit(encode_group(group, capacity, self._settings.max_entry_bytes))

    async def admit(self, payloads: Mapping[str, bytes]) -> Admission:
        """Publish a group that is encoded already, by rollout id."""
        pairs = [part for pair in payloads.items() for part in pair]
        keys = (self._stream, self._ledger, self._seen)
        arguments = (self._settings.capacity, *pairs)
        return Admission((await self._redis.script(scripts.ADMIT, keys, arguments)).decode())

    async def heartbeat(self, entry_ids: Sequence[str]) -> frozenset[str]:
        if not entry_ids:
            return frozenset()
        arguments = (GROUP, self._consumer, *entry_ids)
        kept = await self._with_group(lambda: self._redis.script(scripts.HEARTBEAT, (self._stream,), arguments))
        return frozenset(entry_id.decode() for entry_id in kept)

    async def acknowledge(self, outcomes: Mapping[str, str]) -> int:
        check_outcomes(outcomes.values())
        if not outcomes:
            return 0
        pairs = [part for pair in outcomes.items() for part in pair]
        counted: int = await self._redis.script(scripts.ACKNOWLEDGE, (self._stream, self._ledger), (GROUP, *pairs))
        self._held.difference_update(outcomes)
        return counted

    async def dead_letter(self, entry_id: str, reason: str) -> bool:
        keys = (self._stream, self._ledger, self._dead)
        moved: int = await self._redis.script(scripts.BURY, keys, (GROUP, entry_id, reason))
        self._held.discard(entry_id)
        return moved == 1

    async def status(self) -> QueueStatus:
        keys = (self._stream, self._ledger, self._dead)
        length, claimed, dead_letters, flat = await self._redis.script(scripts.STATUS, keys, (GROUP,))
        ledger = {name.decode(): int(value) for name, value in zip(flat[::2], flat[1::2], strict=True)}
        return QueueStatus.from_ledger(ledger, length=length, claimed=claimed, dead_letters=dead_letters)

    async def dead_letters(self, count: int) -> list[DeadLetter]:
        entries = await self._redis.command("XRANGE", self._dead, "-", "+", "COUNT", count)
        return [
            DeadLetter(fields[b"entry_id"].decode(), fields[b"reason"].decode(), fields[b"payload"])
            for _, fields in entries
        ]

    async def replay(self, entry_id: str) -> Replay:
        keys, arguments = (self._stream, self._ledger, self._dead), (self._settings.capacity, entry_id)
        return Replay((await self._redis.script(scripts.REPLAY, keys, arguments)).decode())

    async def entries(self) -> dict[str, bytes]:
        rows = await self._redis.command("XRANGE", self._stream, "-", "+")
        return {entry_id.decode(): _payload(fields) for entry_id, fields in rows}

    async def _own_pending(self, count: int) -> list[RawEntry]:
        entries: list[RawEntry] = []
        while self._own_cursor is not None and len(entries) < count:
            arguments = (GROUP, self._consumer, self._own_cursor, count - len(entries))
            last, rows = await self._with_group(
                lambda arguments=arguments: self._redis.script(scripts.OWN_PENDING, (self._stream,), arguments)
            )
            self._own_cursor = None if last is None else last.decode()
            entries += _entries(rows)
        return entries

    async def _available(self, count: int) -> list[RawEntry]:
        """The claimed entries are gone through once at most, from where the last call stopped."""
        idle_ms = max(1, round(self._settings.claim_idle_seconds * 1000))
        entries: list[RawEntry] = []
        while len(entries) < count:
            arguments = (GROUP, self._consumer, idle_ms, self._reclaim_cursor, count - len(entries))
            cursor, rows, gone = await self._with_group(
                lambda arguments=arguments: self._redis.script(scripts.AVAILABLE, (self._stream,), arguments)
            )
            report_vanished([entry_id.decode() for entry_id in gone])
            entries += _entries(rows)
            self._reclaim_cursor = cursor.decode()
            if self._reclaim_cursor == _FIRST:
                break
        return entries

    async def _wait_for_new(self, count: int, wait_seconds: float) -> list[RawEntry]:
        # BLOCK 0 would wait for ever.
        block = ("BLOCK", max(1, round(wait_seconds * 1000)))
        command = ("XREADGROUP", "GROUP", GROUP, self._consumer, "COUNT", count, *block, "STREAMS", self._stream, ">")
        reply = await self._with_group(lambda: self._blocking.command(*command))
        return [
            RawEntry(entry_id.decode(), _payload(fields), 1) for _, rows in reply or () for entry_id, fields in rows
        ]

    async def _create_group(self) -> None:
        """Create it at entry 0, so that entries published before the first consumer came are not skipped."""
        try:
            await self._redis.command("XGROUP", "CREATE", self._stream, GROUP, "0", "MKSTREAM")
        except ServerReplyError as error:
            if error.code != "BUSYGROUP":
                raise

    async def _with_group(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """Call; when the group is gone, make it again and repeat once. All entries are then delivered anew."""
        try:
            return await call()
        except ServerReplyError as error:
            if error.code != "NOGROUP":
                raise
        await self._create_group()
        return await call()


def _payload(fields: Mapping[bytes, bytes]) -> bytes:
    """The rollout; empty, thus no JSON, without such a field. The dead-letter script then keeps the other fields."""
    return fields.get(b"rollout", b"")


def _entries(rows: Sequence[Any]) -> list[RawEntry]:
    return [RawEntry(entry_id.decode(), payload, deliveries) for entry_id, payload, deliveries in rows]


async def check_server(redis: RedisConnection) -> None:
    """Raise UnsupportedServerError for a server that cannot run the queue or that may throw work away."""
    info: dict[str, Any] = await redis.command("INFO")
    version = str(info.get("redis_version", "unknown"))
    major = re.match(r"\d+", version)
    if major is None or int(major[0]) < _OLDEST_MAJOR:
        raise UnsupportedServerError(
            f"the server at {redis.address} is Redis {version}; use Redis {_OLDEST_MAJOR}.0 or later, or Valkey"
        )
    policy = str(info.get("maxmemory_policy", "unknown"))
    if policy != "noeviction":
        raise UnsupportedServerError(
            f"the server at {redis.address} has maxmemory-policy {policy}, which throws work away when memory is "
            "short; set maxmemory-policy to noeviction"
        )
