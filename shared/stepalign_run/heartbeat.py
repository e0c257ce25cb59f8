"""A sign of life for processes without an HTTP port: a file that is touched while the process works.

A container's health check compares the file's age with a limit (``deploy/healthcheck.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from stepalign.errors import ConfigError
from stepalign_run.logging import get_logger

_log = get_logger(__name__)

INTERVAL_SECONDS = 5.0


class Heartbeat:
    """Touches ``path``; does nothing when there is none."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def beat(self) -> None:
        """Raises ConfigError when the file cannot be written."""
        if self._path is None:
            return
        try:
            self._path.touch()
        except OSError as error:
            raise ConfigError(f"run.heartbeat_file: {self._path} cannot be touched: {error.strerror}") from None

    @asynccontextmanager
    async def beating(self) -> AsyncGenerator[None, None]:
        """Beat every few seconds for as long as the event loop turns."""

        async def keep_on() -> None:
            while True:
                await asyncio.sleep(INTERVAL_SECONDS)
                try:
                    self.beat()
                except ConfigError as error:
                    # The work goes on; readers of the file will see that it grows old.
                    _log.warning("no sign of life", error=str(error))

        self.beat()
        task = asyncio.create_task(keep_on())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
