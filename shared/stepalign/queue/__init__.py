"""The rollout queue between solver and trainer: bounded, at least once, with a ledger that adds up."""

from __future__ import annotations

import os
from collections.abc import Mapping

from stepalign.config import QueueSection
from stepalign.errors import ConfigError
from stepalign.queue.base import Admission, DeadLetter, Delivery, QueueStatus, RolloutQueue
from stepalign.queue.codec import decode, encode
from stepalign.queue.connection import RedisConnection, run_key
from stepalign.queue.memory import MemoryBroker, MemoryRolloutQueue
from stepalign.queue.redis_streams import RedisRolloutQueue

__all__ = [
    "Admission",
    "DeadLetter",
    "Delivery",
    "MemoryBroker",
    "MemoryRolloutQueue",
    "QueueStatus",
    "RedisRolloutQueue",
    "RolloutQueue",
    "decode",
    "encode",
    "forget_run",
    "open_queue",
    "redis_url",
    "require_redis_url",
]


def redis_url(settings: QueueSection, environ: Mapping[str, str] | None = None) -> str | None:
    """The server's address: ``queue.redis_url``, else the environment's REDIS_URL, else None."""
    return settings.redis_url or (os.environ if environ is None else environ).get("REDIS_URL") or None


def require_redis_url(settings: QueueSection) -> str:
    """The server's address. Raises ConfigError when none is named."""
    url = redis_url(settings)
    if url is None:
        raise ConfigError(
            "no Redis server is named: set queue.redis_url or REDIS_URL, or let `stepalign run` start the embedded one"
        )
    return url


async def forget_run(settings: QueueSection, run_id: str) -> None:
    """Delete everything that the server holds of a run: its queue, ledger, dead letters and policy."""
    connection = RedisConnection(require_redis_url(settings))
    try:
        cursor: bytes | int = 0
        while True:
            cursor, keys = await connection.command("SCAN", cursor, "MATCH", run_key(run_id, "*"), "COUNT", 1000)
            if keys:
                await connection.command("DEL", *keys)
            if int(cursor) == 0:
                return
    finally:
        await connection.close()


def open_queue(settings: QueueSection, run_id: str, consumer: str) -> RolloutQueue:
    """The Redis queue of a run; ``start()`` it before use. Raises ConfigError when no server is named."""
    return RedisRolloutQueue(require_redis_url(settings), run_id, consumer, settings)
