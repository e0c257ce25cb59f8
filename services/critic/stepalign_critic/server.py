"""The critic process: bind, write the address where the supervisor looks for it, serve until SIGTERM, exit with 0.

SIGTERM drains: readiness turns 503 at once, requests are served for ``critic.drain_grace_seconds`` more, so that load
balancers look away before anything is refused. Then new requests are refused with 503 while those that are being
answered are finished, for ``critic.finish_seconds`` at most. A second signal ends the grace, a third gives them up.
Half a minute after that the process ends whatever its threads still do.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from pathlib import Path
from threading import Timer
from types import FrameType

import uvicorn
from fastapi import FastAPI

from stepalign.errors import ConfigError
from stepalign_critic.app import AppSettings, create_app
from stepalign_critic.backends import create_backend
from stepalign_critic.backends.base import Backend
from stepalign_critic.cache import CritiqueCache
from stepalign_critic.cache.store import CritiqueStore
from stepalign_critic.http.access import ApiKeys, check_exposure
from stepalign_critic.http.rate_limit import RateLimiter
from stepalign_critic.lifecycle import Lifecycle, State
from stepalign_critic.metrics import Metrics, exposed
from stepalign_critic.service import CriticService
from stepalign_run.config import Config, CriticSection
from stepalign_run.logging import get_logger
from stepalign_run.redis.address import with_password

URL_FILE = "critic.url"

_OBJECTS_BETWEEN_COLLECTIONS = 20_000
_LAST_ANSWERS_SECONDS = 25
"""How long clients may take to read their answers when the process is about to end. Longer than a body may take to
come (``AppSettings.body_seconds``), so that one that does not come is answered too."""
_LAST_THREADS_SECONDS = 5
"""How long threads of the backend may go on after that: none can be interrupted."""

_log = get_logger(__name__)


def serve(config: Config, backend: Backend | None = None) -> None:
    """Serve the configured critic until SIGTERM or SIGINT. Returns after a graceful shutdown.

    ``backend`` takes the place of the configured one. ``<run_dir>/critic.url`` holds the address while the process
    listens. Raises ConfigError on a run folder that cannot be written, on a host that others can reach while there are
    no API keys, on an address that is taken, and on a backend that does not start; BackendDiedError when it dies later.
    """
    keys = ApiKeys.from_file(config.critic.api_keys_file) if config.critic.api_keys_file is not None else None
    check_exposure(config.critic.host, keys)
    served = create_backend(config.critic) if backend is None else backend
    service = CriticService(served, config.critic.prompts, config.critic.max_steps)
    url_file = config.run_dir / URL_FILE
    try:
        probe = url_file.with_name(f".writable.{os.getpid()}")
        write_atomically(probe, "")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"cannot write {url_file}: {error.strerror}; set run.dir to a folder that can be written"
        ) from None
    listening = _bind(config.critic.host, config.critic.port)
    url_file.unlink(missing_ok=True)
    access = "with API keys" if keys is not None else "on loopback only: there are no API keys"
    _log.info(f"listening {access}", url=_url(listening))
    limit = config.critic.rate_limit_per_minute
    settings = AppSettings(
        max_body_bytes=config.critic.max_body_bytes,
        max_batch_items=config.critic.max_batch_items,
        api_keys=keys,
        cache=_cache(config.critic),
        limiter=None if limit is None else RateLimiter(limit),
    )
    metrics = Metrics(service.engine_registry())
    app = create_app(service, settings, metrics)
    server = _Server(app, service.lifecycle, config.critic, url_file, _url(listening))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit_cleanly)
    try:
        with _exposed(metrics, config.critic):
            server.run(sockets=[listening])
    finally:
        url_file.unlink(missing_ok=True)
    if service.lifecycle.failure is not None:
        raise service.lifecycle.failure


@contextmanager
def _exposed(metrics: Metrics, section: CriticSection) -> Iterator[None]:
    """The metrics on the port that is theirs when there are API keys. Raises ConfigError when it is taken."""
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


def _cache(section: CriticSection) -> CritiqueCache | None:
    """The configured cache. Raises ConfigError for an address or a password file that is none."""
    url = section.cache_redis_url or os.environ.get("REDIS_CACHE_URL") or None
    if url is not None and section.cache_redis_password_file is not None:
        names = "critic.cache_redis_url (or REDIS_CACHE_URL)", "critic.cache_redis_password_file"
        url = with_password(url, *names, section.cache_redis_password_file)
    if not section.cache_entries and url is None:
        return None
    store = CritiqueStore(url, section.cache_ttl_seconds) if url is not None else None
    return CritiqueCache(section.cache_entries, store, section.shaping())


def _exit_cleanly(_signal: int, _frame: FrameType | None) -> None:
    """Before uvicorn takes the signals over, and after it has: being told to stop is no failure."""
    sys.exit(0)


def freeze() -> None:
    """Leave the garbage collector less to do, which otherwise takes a fifth of the time of a request and stalls some.

    What the process has so far stays, so it need not be looked at; and a request makes some thousand objects, so by its
    default the collector would run several times in each.
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


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that a reader sees all of it or no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


class _Server(uvicorn.Server):
    """uvicorn that drains on the first signal, ends with a backend that cannot start or dies, announces its address."""

    def __init__(self, app: FastAPI, lifecycle: Lifecycle, section: CriticSection, url_file: Path, url: str) -> None:
        last = _LAST_ANSWERS_SECONDS
        super().__init__(
            uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=last)
        )
        self._lifecycle = lifecycle
        self._drain_grace = section.drain_grace_seconds
        self._finish_seconds = section.finish_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        # That of a request which a signal interrupts is not ours.
        self._context = copy_context()
        self._signals = 0
        self._finishing: asyncio.Task[None] | None = None
        self._url_file = url_file
        self._url = url
        lifecycle.on_start = freeze
        lifecycle.on_failure = self._finish

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        if self.started:
            write_atomically(self._url_file, self._url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Runs as a signal handler, in the main thread between two instructions."""
        if self._lifecycle.state is State.LOADING:
            # Nothing is being answered, and the thread that loads cannot be interrupted, only left.
            self._url_file.unlink(missing_ok=True)
            os._exit(0)
        assert self._loop is not None, "what has loaded runs in it"
        self._signals += 1
        self._loop.call_soon_threadsafe(self._obey, self._signals, context=self._context)

    def _obey(self, signals: int) -> None:
        """The first signal begins the grace, the second ends it, a third gives up what is being answered."""
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
        """Runs in a thread of its own, while others may hold the interpreter's end up."""
        _log.warning("ending without waiting for threads that do not end")
        self._url_file.unlink(missing_ok=True)
        failure = self._lifecycle.failure
        code = getattr(failure, "exit_code", os.EX_SOFTWARE)
        os._exit(0 if failure is None else code)
