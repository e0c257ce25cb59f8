"""A bounded queue in front of an engine that batches by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from stepalign_critic.errors import SaturatedError


class Admission:
    """Lets ``most_running`` requests in at a time and ``most_waiting`` wait; refuses more."""

    def __init__(self, most_running: int, most_waiting: int) -> None:
        self._places = asyncio.Semaphore(most_running)
        self._most_waiting = most_waiting
        self._waiting = 0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place and hold it. Raises SaturatedError when too many wait already."""
        if self._places.locked() and self._waiting >= self._most_waiting:
            raise SaturatedError(f"{self._waiting} requests wait already, the limit is {self._most_waiting}")
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._places.release()
