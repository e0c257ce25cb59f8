"""When a client hangs up, the work for it is given up."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

T = TypeVar("T")


async def until_hang_up(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client hangs up. The body must have been read.

    Raises ClientDisconnect once the cancelled work has ended.
    """

    working = asyncio.current_task()
    assert working is not None
    cancellations = working.cancelling()
    hung_up = False

    async def watch() -> None:
        nonlocal hung_up
        while (await receive())["type"] != "http.disconnect":
            pass
        hung_up = True
        working.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        # Without a hang-up, or with another cancellation besides, the error is not ours to change.
        if hung_up and working.uncancel() <= cancellations:
            raise ClientDisconnect from None
        raise
    finally:
        watching.cancel()
