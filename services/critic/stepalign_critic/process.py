"""The critic's process: it binds, says where it listens, serves until SIGTERM and exits with 0.

SIGTERM drains: readiness turns 503 at once, requests are served for ``critic.drain_grace_seconds`` more, so that load
balancers look away before anything is refused. Then new requests are refused with 503 while those in progress are
finished, for ``critic.finish_seconds`` at most. A second signal ends the grace, a third gives them up. Half a minute
after that the process ends, even where a thread still works.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from threading import Timer
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from stepalign.errors import ConfigError
from stepalign.plugins import load_grader
from stepalign_critic.address_file import AddressFile
from stepalign_critic.app import AppSettings, create_app
from stepalign_critic.backends import create_backend
from stepalign_critic.backends.base import Backend
from stepalign_critic.cache import CritiqueCache
from stepalign_critic.cache.store import CritiqueStore
from stepalign_critic.http.access import ApiKeys, check_exposure
from stepalign_critic.http.door import SPARE_CONNECTIONS, Door, DoorSettings
from stepalign_critic.http.rate_limit import RateLimiter
from stepalign_critic.http.server import server_config
from stepalign_critic.lifecycle import Lifecycle, State
from stepalign_critic.metrics import Metrics, exposed
from stepalign_critic.service import AlignedDecoding, CriticService
from stepalign_run.config import CriticServerSection
from stepalign_run.logging import get_logger
from stepalign_run.redis.address import with_password

_OBJECTS_BETWEEN_COLLECTIONS = 20_000
_LAST_ANSWERS_SECONDS = 25
"""How long clients may take to read their answers when the process is about to end. It exceeds the time for a body
(``AppSettings.body_seconds``), so that a client whose body never comes is answered too."""
_LAST_THREADS_SECONDS = 5
"""How long threads of the backend may go on after that: none can be interrupted."""

_OTHER_FILES = 128
"""Files that the process has open besides its clients' connections."""

_log = get_logger(__name__)


def serve(section: CriticServerSection, backend: Backend | None = None) -> None:
    """Serve the configured critic until SIGTERM or SIGINT. Returns after a graceful shutdown.

    ``backend`` takes the place of the configured one. Raises ConfigError on an address file that cannot be written, on
    a host that others can reach while there are no API keys, on an address that is taken, on more connections than
    the process may have files, and on a backend that does not start; BackendDiedError when the backend dies later.
    """
    keys = ApiKeys.from_file(section.api_keys_file) if section.api_keys_file is not None else None
    check_exposure(section.host, keys)
    _allow_files(section.max_connections)
    served = create_backend(section) if backend is None else backend
    aligned = None
    if section.decoding == "aligned":
        aligned = AlignedDecoding(
            section.max_new_tokens, section.trust_answers, section.check_known_attempts, section.wrong_threshold
        )
    grader = load_grader(section.grader, "critic.grader")
    service = CriticService(
        served, section.prompts, section.max_steps, grader, aligned=aligned, settings=_digest(section.shaping())
    )
    address_file = AddressFile(section.address_file)
    listening = _bind(section.host, section.port)
    # Only now: while another process holds the port, the file may be its own.
    address_file.remove()
    access = "with API keys" if keys is not None else "on loopback only: there are no API keys"
    _log.info(f"listening {access}", url=_url(listening))
    limit = section.rate_limit_per_minute
    settings = AppSettings(
        max_body_bytes=section.max_body_bytes,
        max_batch_items=section.max_batch_items,
        api_keys=keys,
        cache=_cache(section),
        limiter=None if limit is None else RateLimiter(limit),
        cors_origins=tuple(section.cors_origins),
    )
    metrics = Metrics(service.engine_registry())
    app = create_app(service, settings, metrics)
    door = Door(DoorSettings(section.max_connections, section.keep_alive_seconds), metrics)
    server = _Server(app, door, service.lifecycle, section, address_file, _url(listening))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit_cleanly)
    try:
        with _exposed(metrics, section):
            server.run(sockets=[listening])
    finally:
        address_file.remove()
    if service.lifecycle.failure is not None:
        raise service.lifecycle.failure


@contextmanager
def _exposed(metrics: Metrics, section: CriticServerSection) -> Iterator[None]:
    """Serve the metrics on their own port where there are API keys. Raises ConfigError when it is taken."""
    if section.api_keys_file is None:
        yield
        return
    host, port = section.metrics_host, section.metrics_port
    with ExitStack() as stack:
        try:
            url = stack.enter_context(exposed(metrics, host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on critic.metrics_host:metrics_port {host}:{port}: {error}") from error
        _log.info("metrics, without a key", url=url)
        yield


def _cache(section: CriticServerSection) -> CritiqueCache | None:
    """The configured cache. Raises ConfigError for an invalid address or an unreadable password file."""
    url = section.cache_redis_url or os.environ.get("REDIS_CACHE_URL") or None
    if url is not None and section.cache_redis_password_file is not None:
        names = "critic.cache_redis_url (or REDIS_CACHE_URL)", "critic.cache_redis_password_file"
        url = with_password(url, *names, section.cache_redis_password_file)
    if not section.cache_entries and url is None:
        return None
    store = CritiqueStore(url, section.cache_ttl_seconds) if url is not None else None
    return CritiqueCache(section.cache_entries, store, section.shaping())


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _exit_cleanly(_signal: int, _frame: FrameType | None) -> None:
    """Exit with 0 on a signal before uvicorn handles signals, and after: an order to stop is no failure."""
    sys.exit(0)


def freeze() -> None:
    """Leave the garbage collector less to do: by default it takes a fifth of a request's time and stalls some.

    The objects of the process so far stay alive, so the collector passes them over. A request makes some thousand
    objects, so at its default threshold the collector would run several times in each.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)


def _bind(host: str, port: int) -> socket.socket:
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        # asyncio sets this itself only on sockets that it has made: without it an answer's second packet waits for the
        # client's delayed acknowledgement of the first, some 40 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except OSError as error:
        raise ConfigError(f"cannot listen on critic.host:port {host}:{port}: {error}") from error


def _allow_files(connections: int) -> None:
    """Let the process have a file for each connection. Raises ConfigError when the system lets it have fewer."""
    needed = connections + SPARE_CONNECTIONS + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"critic.max_connections is {connections}, which takes {needed} open files, and this process may have "
            f"{hard}: lower it to {max(hard - needed + connections, 1)}, or raise the limit (ulimit -Hn)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn that drains on the first signal, ends with a failed backend, and writes its address to a file."""

    def __init__(
        self,
        app: FastAPI,
        door: Door,
        lifecycle: Lifecycle,
        section: CriticServerSection,
        address_file: AddressFile,
        url: str,
    ) -> None:
        super().__init__(server_config(app, door, timeout_graceful_shutdown=_LAST_ANSWERS_SECONDS))
        self._lifecycle = lifecycle
        self._drain_grace = section.drain_grace_seconds
        self._finish_seconds = section.finish_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        # A signal may interrupt a request, and would else run in that request's context.
        self._context = copy_context()
        self._signals = 0
        self._finishing: asyncio.Task[None] | None = None
        self._address_file = address_file
        self._url = url
        lifecycle.on_start = freeze
        lifecycle.on_failure = self._finish

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        if self.started:
            self._address_file.write(self._url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Pass a signal on to the event loop. It runs in the main thread between two instructions."""
        if self._lifecycle.state is State.LOADING:
            # There are no requests yet, and the thread that loads cannot be interrupted, only left.
            self._address_file.remove()
            os._exit(0)
        assert self._loop is not None, "a loaded critic runs in the loop"
        self._signals += 1
        self._loop.call_soon_threadsafe(self._obey, self._signals, context=self._context)

    def _obey(self, signals: int) -> None:
        """The first signal begins the grace, the second ends it, a third gives up the requests in progress."""
        serving = self._lifecycle.drain()
        if signals == 1 and serving and self._drain_grace > 0:
            _log.info("draining", seconds=self._drain_grace)
            asyncio.get_running_loop().call_later(self._drain_grace, self._finish)
        elif signals < 3:
            self._finish()
        else:
            self._lifecycle.give_up()

    def _finish(self) -> None:
        if self._finishing is None:
            self._finishing = asyncio.create_task(self._finish_and_exit())

    async def _finish_and_exit(self) -> None:
        try:
            # The port stays open meanwhile: a request that still comes is told to go elsewhere.
            await self._lifecycle.finish(self._finish_seconds)
        finally:
            self.should_exit = True
            last = Timer(_LAST_ANSWERS_SECONDS + _LAST_THREADS_SECONDS, self._context.copy().run, [self._end_at_once])
            last.daemon = True
            last.start()

    def _end_at_once(self) -> None:
        """End the process from a thread of its own, while other threads hold up the interpreter's end."""
        _log.warning("ending without waiting for threads that do not end")
        self._address_file.remove()
        failure = self._lifecycle.failure
        code = getattr(failure, "exit_code", os.EX_SOFTWARE)
        os._exit(0 if failure is None else code)
