"""A bounded queue in front of an engine that batches by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from stepalign_critic.backends.moving_mean import MovingMean
from stepalign_critic.errors import SaturatedError


class Admission:
    """Lets ``most_running`` requests in at a time and ``most_waiting`` wait; refuses more.

    ``clock`` gives monotonic seconds, for how long places are held.
    """

    def __init__(self, most_running: int, most_waiting: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._places = asyncio.Semaphore(most_running)
        self._most_running = most_running
        self._most_waiting = most_waiting
        self._waiting = 0
        self._clock = clock
        self._held_seconds = MovingMean()

    def expected_wait_seconds(self) -> float | None:
        """Expected wait of a new request for a place; None before an answer was measured.

        Of ``most_running`` places that are all held for m seconds each, one becomes free every m / most_running; the
        newcomer needs one for each that waits already, and one for itself.
        """
        if self._held_seconds.value is None:
            return None
        ahead = self._waiting + 1 if self._places.locked() else 0
        return ahead * self._held_seconds.value / self._most_running

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place and hold it. Raises SaturatedError when too many wait already."""
        leave = await self.enter()
        answered = False
        try:
            yield
            answered = True
        finally:
            # A failed or abandoned request does not measure the time of an answer.
            leave(answered)

    async def enter(self) -> Callable[[bool], None]:
        """Wait for a place. Returns the function that leaves it; it is called once, with True after an answer.

        Raises SaturatedError when too many wait already.
        """
        if self._places.locked() and self._waiting >= self._most_waiting:
            raise SaturatedError(f"{self._waiting} requests wait already, the limit is {self._most_waiting}")
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        began = self._clock()

        def leave(answered: bool) -> None:
            if answered:
                self._held_seconds.add(self._clock() - began)
            self._places.release()

        return leave
