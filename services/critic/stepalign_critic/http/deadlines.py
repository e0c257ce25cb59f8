"""Deadlines of clients: ``X-Request-Timeout-Ms``, counted from when the request has been read.

A request that cannot be answered in time is refused before it takes a place in the queue. One that was not answered in
time is given up and leaves the queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, TypeAdapter, ValidationError

from stepalign.types import MAX_REQUEST_TIMEOUT_MS, REQUEST_TIMEOUT_HEADER
from stepalign_critic.errors import DeadlineExceededError, DeadlineUnreachableError
from stepalign_critic.lifecycle import Lifecycle

T = TypeVar("T")

_MILLISECONDS = TypeAdapter(Annotated[int, Field(ge=1, le=MAX_REQUEST_TIMEOUT_MS)])

TIMEOUT_PARAMETER = {
    "in": "header",
    "name": REQUEST_TIMEOUT_HEADER,
    "required": False,
    "description": "How long the client waits for its answer, in milliseconds. Afterwards the answer is a 504.",
    "schema": {**_MILLISECONDS.json_schema(), "title": "X-Request-Timeout-Ms"},
}
"""The header in the OpenAPI document."""


def deadline_of(request: Request) -> float | None:
    """Seconds on the event loop's clock, or None when the client set no deadline.

    Raises RequestValidationError for an invalid header. It is read here and not declared as a parameter, for which
    FastAPI takes a sixteenth of a request's time.
    """
    given = request.headers.get(REQUEST_TIMEOUT_HEADER)
    if given is None:
        return None
    try:
        milliseconds = _MILLISECONDS.validate_python(given)
    except ValidationError as error:
        (found,) = error.errors()
        raise RequestValidationError([{**found, "loc": ("header", REQUEST_TIMEOUT_HEADER)}]) from None
    return asyncio.get_running_loop().time() + milliseconds / 1000


def check_reachable(deadline: float | None, lifecycle: Lifecycle) -> None:
    """Refuse a request whose expected wait alone outlasts ``deadline``. Raises DeadlineUnreachableError."""
    if deadline is None:
        return
    remaining = max(deadline - asyncio.get_running_loop().time(), 0.0)
    wait = lifecycle.expected_wait_seconds()
    if wait is not None and wait > remaining:
        raise DeadlineUnreachableError(
            f"the wait is about {wait:.1f} s, and {remaining:.1f} s remain; allow more time or try again later"
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
        # Before the deadline it is an error of the work's own.
        if limit.expired():
            raise DeadlineExceededError("the deadline of X-Request-Timeout-Ms passed before the answer") from error
        raise
