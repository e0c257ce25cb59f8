"""A response's head and body in one write.

uvicorn writes the head by itself, and uvloop sends each write at once: that is a system call and a packet more, for
which the client wakes up twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

_MOST_HELD_BYTES = 4096


class JoinedWrites:
    """``transport``, but that a short write waits for what follows it, at most until the event loop's next turn."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held = b""
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send ``data`` after what is held."""
        if self._held:
            joined, self._held = self._held + data, b""
            self._transport.write(joined)
        elif len(data) <= _MOST_HELD_BYTES:
            self._held = data
            self._loop.call_soon(self._flush)
        else:
            self._transport.write(data)

    def writelines(self, list_of_data: Iterable[bytes]) -> None:
        """Send the pieces after what is held."""
        self.write(b"".join(list_of_data))

    def write_eof(self) -> None:
        """Send what is held, and then the end."""
        self._flush()
        self._transport.write_eof()

    def close(self) -> None:
        """Send what is held, and close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        held, self._held = self._held, b""
        if held and not self.is_closing():
            self._transport.write(held)
