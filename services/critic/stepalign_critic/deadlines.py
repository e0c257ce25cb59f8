"""Deadlines of clients: ``X-Request-Timeout-Ms``, counted from when the request has been read.

What cannot be answered in time is refused before it takes a place in the queue; what was not answered in time is given
up, and leaves the queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

from fastapi import Header
from pydantic import Field, WithJsonSchema

from stepalign.types import MAX_REQUEST_TIMEOUT_MS, REQUEST_TIMEOUT_HEADER
from stepalign_critic.errors import DeadlineExceededError, DeadlineUnreachableError
from stepalign_critic.lifecycle import Lifecycle

T = TypeVar("T")

# A header may be missing, but none says null.
TimeoutHeader = Annotated[
    Annotated[int, Field(ge=1, le=MAX_REQUEST_TIMEOUT_MS)] | None,
    WithJsonSchema({"type": "integer", "minimum": 1, "maximum": MAX_REQUEST_TIMEOUT_MS}),
    Header(
        alias=REQUEST_TIMEOUT_HEADER,
        description="How long the client waits for its answer, in milliseconds. Afterwards the answer is a 504.",
    ),
]


def deadline_after(timeout_ms: int | None) -> float | None:
    """Seconds on the event loop's clock, or None when the client set no deadline."""
    return None if timeout_ms is None else asyncio.get_running_loop().time() + timeout_ms / 1000


def check_reachable(deadline: float | None, lifecycle: Lifecycle) -> None:
    """Raises DeadlineUnreachableError when the expected wait alone outlasts ``deadline``."""
    if deadline is None:
        return
    remaining = deadline - asyncio.get_running_loop().time()
    wait = lifecycle.expected_wait_seconds()
    if wait is not None and wait > remaining:
        raise DeadlineUnreachableError(
            f"the wait is about {wait:.1f} s, and {max(remaining, 0):.1f} s remain; allow more time or try again later"
        )


async def within(deadline: float | None, work: Callable[[], Awaitable[T]]) -> T:
    """The result of ``work``. Raises DeadlineExceededError when the deadline passes; the work is cancelled."""
    if deadline is None:
        return await work()
    limit = asyncio.timeout_at(deadline)
    try:
        async with limit:
            return await work()
    except TimeoutError as error:
        # Else it is an error of the work's own.
        if limit.expired():
            raise DeadlineExceededError("the deadline of X-Request-Timeout-Ms passed before the answer") from error
        raise
