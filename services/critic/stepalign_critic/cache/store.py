"""Critiques shared between replicas of the critic, in a Redis of their own.

The server is a cache: give it ``maxmemory-policy allkeys-lru``. The work queue's must not evict, so it is another one;
a server that evicts nothing is left alone, since a cache would fill it up. A server that does not answer costs a second
of waiting at most and never an answer: callers go on without it.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, RedisError

from stepalign.errors import ConfigError, StepalignError

_PREFIX = "stepalign:critique:"
_TIMEOUT_SECONDS = 1.0
_PAUSE_SECONDS = 5.0


class StoreUnavailableError(StepalignError):
    """The cache's server is of no use."""


class StorePausedError(StoreUnavailableError):
    """The server was of no use a moment ago, and is not asked."""


class CritiqueStore:
    """Keeps texts by key at ``url`` for ``ttl_seconds``. Raises ConfigError when it is no Redis address."""

    def __init__(self, url: str, ttl_seconds: int) -> None:
        options: dict[str, Any] = {
            "protocol": 2,
            "socket_timeout": _TIMEOUT_SECONDS,
            "socket_connect_timeout": _TIMEOUT_SECONDS,
        }
        try:
            self._redis: Any = Redis.from_url(url, **options)  # pyright: ignore[reportUnknownMemberType]
        except ValueError as error:
            raise ConfigError(f"critic.cache_redis_url (or REDIS_CACHE_URL) is no Redis address: {error}") from None
        self._ttl_seconds = ttl_seconds
        self._evicts = False
        self._down_until = 0.0

    async def get(self, key: str) -> bytes | None:
        """The text of ``key``; None without one. Raises StoreUnavailableError."""
        return await self._command("GET", _PREFIX + key)

    async def set(self, key: str, text: str) -> None:
        """Keep ``text`` under ``key``. Raises StoreUnavailableError."""
        await self._command("SET", _PREFIX + key, text, "EX", self._ttl_seconds)

    async def _command(self, *parts: str | int) -> Any:
        # After a failure requests do not each wait for the server in turn.
        if time.monotonic() < self._down_until:
            raise StorePausedError("the cache's Redis was of no use a moment ago")
        try:
            await self._check_policy()
            return await self._redis.execute_command(*parts)
        except (RedisError, OSError) as error:
            self._down_until = time.monotonic() + _PAUSE_SECONDS
            message = f"the cache's Redis does not answer: {type(error).__name__}: {error}"
            raise StoreUnavailableError(message) from error

    async def _check_policy(self) -> None:
        """Refuse a server that evicts nothing: it may be the work queue's. Raises StoreUnavailableError."""
        if self._evicts:
            return
        memory: dict[str, Any] = {}
        # A server may not permit the question.
        with suppress(NoPermissionError):
            memory = await self._redis.info("memory")
        if memory.get("maxmemory_policy") == "noeviction":
            self._down_until = time.monotonic() + _PAUSE_SECONDS
            raise StoreUnavailableError(
                "the cache's Redis has maxmemory-policy noeviction and is not used: give the cache a server of its own "
                "with allkeys-lru (critic.cache_redis_url)"
            )
        self._evicts = True

    async def close(self) -> None:
        await self._redis.aclose()
