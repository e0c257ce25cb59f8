"""The rollout queue between solver and trainer: bounded, at least once, with a ledger that adds up."""

from __future__ import annotations

import os
from collections.abc import Mapping

from stepalign.errors import ConfigError
from stepalign_run.config import Config, QueueSection
from stepalign_run.queue.base import Admission, DeadLetter, Delivery, QueueStatus, Replay, RolloutQueue
from stepalign_run.queue.codec import decode, encode
from stepalign_run.queue.redis_streams import RedisRolloutQueue
from stepalign_run.redis.address import with_password
from stepalign_run.redis.connection import RedisConnection, run_key

__all__ = [
    "Admission",
    "DeadLetter",
    "Delivery",
    "QueueStatus",
    "RedisRolloutQueue",
    "Replay",
    "RolloutQueue",
    "decode",
    "encode",
    "forget_run",
    "open_queue",
    "redis_url",
    "require_redis_url",
    "resolve_url",
]


def redis_url(settings: QueueSection, environ: Mapping[str, str] | None = None) -> str | None:
    """The server's address: ``queue.redis_url``, else the environment's REDIS_URL, else None.

    The password of ``queue.redis_password_file`` is put into it. Raises ConfigError when that file cannot be read, or
    when the address has another password already.
    """
    url = settings.redis_url or (os.environ if environ is None else environ).get("REDIS_URL") or None
    if url is None or settings.redis_password_file is None:
        return url
    names = "queue.redis_url (or REDIS_URL)", "queue.redis_password_file"
    return with_password(url, *names, settings.redis_password_file)


def require_redis_url(settings: QueueSection) -> str:
    """The server's address. Raises ConfigError when none is named."""
    url = redis_url(settings)
    if url is None:
        raise ConfigError(
            "no Redis server is named: set queue.redis_url or REDIS_URL, or let `stepalign run` start the embedded one"
        )
    return url


def resolve_url(config: Config) -> str:
    """The server of a run: the configured one, else the embedded one that is running. Raises ConfigError."""
    configured = redis_url(config.queue)
    if configured is not None:
        return configured
    folder = config.folder
    path = folder.redis_url
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise ConfigError(
            f"the run is not in progress: its embedded Redis server is not running ({path} does not exist). Once it "
            f"has ended, {folder.report} says what became of its rollouts. For a server of your own "
            "set queue.redis_url or REDIS_URL."
        ) from None


async def forget_run(settings: QueueSection, run_id: str) -> None:
    """Delete everything that the server holds of a run: its queue, ledger, dead letters and policy."""
    connection = RedisConnection(require_redis_url(settings), settings.reconnect_seconds)
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
