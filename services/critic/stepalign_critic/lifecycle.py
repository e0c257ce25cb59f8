"""Whether this process takes requests: loading → ready → draining, or failed when the backend did not start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import StrEnum

from stepalign.logging import get_logger
from stepalign_critic.backends.base import Backend
from stepalign_critic.errors import NotReadyError

_log = get_logger(__name__)


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Lifecycle:
    """Starts the backend in the background, so that liveness answers while a model loads, and stops it.

    ``on_failure`` is called once when the backend cannot start; ``failure`` then holds the error.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._starting: asyncio.Task[None] | None = None
        self.state = State.LOADING
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None

    def begin(self) -> None:
        self._starting = asyncio.create_task(self._start())

    async def _start(self) -> None:
        try:
            await self._backend.start()
        except Exception as error:
            _log.error("backend did not start", backend=self._backend.name, error=str(error))
            self.state, self.failure = State.FAILED, error
            self.on_failure()
            return
        if self.state is State.LOADING:
            self.state = State.READY
        _log.info("backend started", backend=self._backend.name, state=self.state)

    def drain(self) -> None:
        """Refuse new requests from now on; those that are being answered are finished."""
        if self.state is not State.FAILED:
            self.state = State.DRAINING

    async def end(self) -> None:
        """Drain, and release the backend."""
        self.drain()
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await self._backend.stop()

    def refusal(self) -> NotReadyError | None:
        """Why no request is taken now; None when requests are taken."""
        reasons = {
            State.LOADING: "the critic's backend is loading",
            State.DRAINING: "the critic is draining; it finishes what it has and ends",
            State.FAILED: f"the critic's backend did not start: {self.failure}",
        }
        if self.state in reasons:
            return NotReadyError(reasons[self.state], self.state.value)
        if not self._backend.healthy():
            return NotReadyError("the critic's backend stopped working", "unhealthy")
        return None
