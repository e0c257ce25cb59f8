"""Several calls of one critique at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

Result = TypeVar("Result")


async def together(calls: Iterable[Callable[[], Awaitable[Result]]], at_once: int) -> list[Result]:
    """The results of ``calls``, in their order; at most ``at_once`` are under way.

    The first error cancels the other calls and is raised, once they have ended.
    """
    places = asyncio.Semaphore(at_once)

    async def one(call: Callable[[], Awaitable[Result]]) -> Result:
        async with places:
            return await call()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(call)) for call in calls]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]
