"""The states of the process: loading → ready → draining → stopping, or failed if the backend did not start or has died.

A draining process still serves: only readiness says no, so that load balancers send their requests elsewhere. A
stopping one refuses new requests and finishes those in progress.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from enum import StrEnum

from stepalign_critic.backends.base import Backend, Explained
from stepalign_critic.errors import BackendDiedError, NotReadyError
from stepalign_run.logging import get_logger

_LOOK_SECONDS = 1.0

_log = get_logger(__name__)


class State(StrEnum):
    """A state of the process."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    FAILED = "failed"


class Lifecycle:
    """Starts the backend in the background, so that liveness answers while a model loads, and stops it.

    ``on_start`` is called once when the backend has started, ``on_failure`` when it cannot or when it has died since;
    ``failure`` then holds the error. ``ready_since`` is the time of the start, in seconds since 1970.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.check: Callable[[], Awaitable[None]] | None = None
        """Asked once the backend has started; an error of it is a failure to start."""
        self._working: asyncio.Task[None] | None = None
        self._answering: set[asyncio.Timeout] = set()
        self._idle = asyncio.Event()
        self.state = State.LOADING
        self.failure: Exception | None = None
        self.ready_since: float | None = None
        self.on_start: Callable[[], None] = lambda: None
        self.on_failure: Callable[[], None] = lambda: None

    def begin(self) -> None:
        """Start the backend in the background."""
        self._working = asyncio.create_task(self._start_and_watch())

    async def _start_and_watch(self) -> None:
        try:
            await self._backend.start()
            if self.check is not None:
                await self.check()
        except Exception as error:
            self._fail("backend did not start", error)
            return
        self.on_start()
        self.ready_since = time.time()
        if self.state is State.LOADING:
            self.state = State.READY
        _log.info("backend started", backend=self._backend.name, state=self.state)
        if self._backend.recovers:
            return
        while self._backend.healthy():
            await asyncio.sleep(_LOOK_SECONDS)
        self._fail("backend died", BackendDiedError(f"the backend {self._backend.name} has stopped working for good"))

    def _fail(self, event: str, error: Exception) -> None:
        _log.error(event, backend=self._backend.name, error=str(error))
        self.state, self.failure = State.FAILED, error
        self.on_failure()

    def drain(self) -> bool:
        """Go on serving without being ready. False when no backend can serve: stop at once."""
        if self.state is State.READY:
            self.state = State.DRAINING
        return self.state is State.DRAINING

    def stop(self) -> None:
        """Refuse new requests from now on; those in progress are finished."""
        if self.state is not State.FAILED:
            self.state = State.STOPPING

    @asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        """Surround the making of one answer. Raises NotReadyError when the process ends before there is one."""
        limit = asyncio.timeout(None)
        self._answering.add(limit)
        self._idle.clear()
        try:
            async with limit:
                yield
        except TimeoutError:
            if limit.expired():
                said = "the critic is stopping and has given this request up; send it again, to another one"
                raise NotReadyError(said, State.STOPPING.value) from None
            raise
        finally:
            self._answering.discard(limit)
            if not self._answering:
                self._idle.set()

    async def finish(self, seconds: float) -> None:
        """Stop, wait for the requests in progress, and give up those that are unanswered after ``seconds``."""
        self.stop()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._answering:
                    await self._idle.wait()
        self.give_up()

    def give_up(self) -> None:
        """Give up the requests in progress."""
        # One that has expired may take its time to end, and a second call must not touch it.
        held = [limit for limit in self._answering if not limit.expired()]
        if held:
            _log.warning("requests are given up", count=len(held))
        for limit in held:
            limit.reschedule(asyncio.get_running_loop().time())

    async def end(self) -> None:
        """Stop, and release the backend."""
        self.stop()
        if self._working is not None:
            self._working.cancel()
            await asyncio.gather(self._working, return_exceptions=True)
        await self._backend.stop()

    @property
    def leaving(self) -> bool:
        """Whether this process will end soon."""
        return self.state in (State.DRAINING, State.STOPPING)

    def unreadiness(self) -> NotReadyError | None:
        """The reason to send no new request here; None when this process is ready."""
        if self.state is State.DRAINING:
            return NotReadyError("the critic is draining: it will end soon", self.state.value)
        return self.refusal()

    def refusal(self) -> NotReadyError | None:
        """The reason to take no request now; None when requests are taken."""
        if self.state not in (State.READY, State.DRAINING):
            reasons = {
                State.LOADING: "the critic's backend is loading",
                State.STOPPING: "the critic is stopping: it finishes what it has and ends",
                State.FAILED: f"the critic's backend failed: {self.failure}",
            }
            return NotReadyError(reasons[self.state], self.state.value)
        if not self._backend.healthy():
            return NotReadyError(self._trouble(), "unhealthy")
        return None

    def _trouble(self) -> str:
        backend = self._backend
        return backend.trouble() if isinstance(backend, Explained) else "the critic's backend stopped working"

    def expected_wait_seconds(self) -> float | None:
        """Expected wait of a new request for the backend; None when unknown or when none is taken."""
        return self._backend.expected_wait_seconds() if self.refusal() is None else None
