"""A connection pool to a Redis server that raises our own errors: the one place that knows redis-py's exceptions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import EqualJitterBackoff, NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from stepalign.errors import ConfigError, QueueError, QueueUnavailableError
from stepalign_run.logging import get_logger

Argument = str | bytes | int | float
_Execute = Callable[..., Awaitable[Any]]
_log = get_logger(__name__)

_BACKOFF_BASE_SECONDS = 0.1
_BACKOFF_CAP_SECONDS = 1.0
_SYNC_MILLISECONDS = 5000


class ServerReplyError(QueueError):
    """The server answered with an error. ``code`` is the reply's first word, such as NOGROUP."""

    def __init__(self, reply: str) -> None:
        self.code = reply.split(" ", 1)[0]
        super().__init__(f"the Redis server answered: {reply}")


def run_key(run_id: str, name: str) -> str:
    """The Redis key of one thing of one run. The braces keep a run's keys in one cluster slot, as scripts need."""
    return f"stepalign:{{{run_id}}}:{name}"


class RedisConnection:
    """A pool: concurrent commands use connections of their own.

    An outage is retried with growing waits, ``reconnect_seconds`` in all or a little more. So every command sent here
    must bear being sent twice. Raises ConfigError for an address that is no Redis URL. Messages never hold the
    password.
    """

    def __init__(self, url: str, reconnect_seconds: float, timeout_seconds: float = 10.0) -> None:
        backoff = EqualJitterBackoff(_BACKOFF_CAP_SECONDS, _BACKOFF_BASE_SECONDS)
        self._retry = Retry(backoff, _retries(reconnect_seconds))
        # RESP2: its replies have one shape in every redis-py from 6.4 on. Retrying is done here, around the pool:
        # inside, redis-py nests two retry loops, and 6.4 does not retry a refused connection.
        options: dict[str, Any] = {
            "protocol": 2,
            "socket_timeout": timeout_seconds,
            "retry": Retry(NoBackoff(), 0),
        }
        try:
            self.address = _without_password(url)
            self._redis: Redis = Redis.from_url(url, **options)  # pyright: ignore[reportUnknownMemberType]
        except ValueError as error:
            raise ConfigError(f"queue.redis_url (or REDIS_URL) is no Redis address: {error}") from None

    async def command(self, *parts: Argument) -> Any:
        execute = cast("_Execute", self._redis.execute_command)  # pyright: ignore[reportUnknownMemberType]
        return await self._persist(lambda: execute(*parts))

    async def command_synced(self, *parts: Argument) -> Any:
        """Send a command and wait until the server has synced it to its append-only file, safe from a power cut.

        Logs a warning when the server has no such file, is older than Redis 7.2 or takes too long: then its own
        settings decide how much is safe.
        """

        async def both() -> Any:
            pipeline: Any = self._redis.pipeline(transaction=False)
            # In one pipeline: the server waits for the writes of this connection.
            pipeline.execute_command(*parts)
            pipeline.execute_command("WAITAOF", 1, 0, _SYNC_MILLISECONDS)
            result, synced = await pipeline.execute(raise_on_error=False)
            if isinstance(result, RedisError):
                raise result
            if isinstance(synced, RedisError) or not synced[0]:
                _log.warning("the server has not synced its append-only file", command=parts[0], reply=str(synced))
            return result

        return await self._persist(both)

    async def script(self, source: str, keys: Sequence[str], arguments: Sequence[Argument] = ()) -> Any:
        """Run a Lua script in one step. redis-py sends its text once and its hash from then on."""
        run: _Execute = self._redis.register_script(source)
        return await self._persist(lambda: run(keys, arguments))

    async def _persist(self, call: Callable[[], Awaitable[Any]]) -> Any:
        async def once() -> Any:
            try:
                return await call()
            except AuthenticationError as error:
                # redis-py counts it among the connection errors, which are tried again; a password stays wrong.
                raise QueueUnavailableError(
                    f"the Redis server at {self.address} refuses the password: {error}"
                ) from error

        with self._named_errors():
            return await self._retry.call_with_retry(once, self._report)

    async def _report(self, error: Exception) -> None:
        _log.warning("redis does not answer", address=self.address, error=str(error))

    async def close(self) -> None:
        await self._redis.aclose()

    @contextmanager
    def _named_errors(self) -> Generator[None, None, None]:
        try:
            yield
        except (RedisConnectionError, RedisTimeoutError) as error:
            raise QueueUnavailableError(f"no Redis server answers at {self.address}: {error}") from error
        except ResponseError as error:
            raise ServerReplyError(str(error)) from error
        except RedisError as error:
            raise QueueError(f"redis at {self.address}: {error}") from error


def _retries(seconds: float) -> int:
    """How many waits of the backoff, each three quarters of its longest on average, fill ``seconds``."""
    waits, total = 0, 0.0
    while total < seconds:
        waits += 1
        total += 0.75 * min(_BACKOFF_CAP_SECONDS, _BACKOFF_BASE_SECONDS * 2**waits)
    return waits


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"
