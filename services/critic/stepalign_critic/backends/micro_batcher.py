"""Dynamic micro-batching: one worker thread computes requests together that arrive close together.

The first waiting request opens a window of ``wait_seconds``; the batch starts when the window ends or ``max_batch``
requests wait. Where more wait than fit, the oldest goes with those nearest to it in size, so that little is padded and
none waits for ever. While a batch runs, later requests wait, so the next batch starts at once when their window has
passed.

The computation is a function of its own: it takes a list of items and returns their results in the same order. At any
time it can ask which of them are still wanted.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from stepalign_critic.backends.moving_mean import MovingMean
from stepalign_critic.errors import EngineError, NotReadyError, SaturatedError
from stepalign_run.logging import get_logger

Item = TypeVar("Item")
Result = TypeVar("Result")

Wanted = Callable[[int], bool]
"""Whether somebody still waits for the result of the item at this index of the batch. Called from the worker thread."""

_log = get_logger(__name__)


@dataclass(frozen=True, eq=False)
class _Waiting(Generic[Item, Result]):
    item: Item
    arrived: float
    result: asyncio.Future[Result]


class MicroBatcher(Generic[Item, Result]):
    """Gathers items into batches for ``run``, a blocking function that is called from one thread at a time.

    ``max_batch`` and ``max_queue`` count requests, ``max_queue`` only those that wait; ``wait_seconds`` is the window,
    ``size`` the length to which an item's batch is padded.
    ``clock`` gives monotonic seconds, for the duration of batches.
    """

    def __init__(
        self,
        run: Callable[[list[Item], Wanted], list[Result]],
        *,
        max_batch: int,
        max_queue: int,
        wait_seconds: float,
        size: Callable[[Item], int] = lambda _: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._wait_seconds = wait_seconds
        self._size = size
        self._clock = clock
        self._batch_seconds = MovingMean()
        self._computing = False
        self._waiting: deque[_Waiting[Item, Result]] = deque()
        self._some = asyncio.Event()
        self._full = asyncio.Event()
        self._thread: ThreadPoolExecutor | None = None
        self._worker: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether the worker takes items."""
        return self._worker is not None and not self._worker.done()

    def expected_wait_seconds(self) -> float | None:
        """Expected wait of a new request for the start of its batch; None before a batch was measured.

        While a batch is computed that is ``ceil((waiting + 1) / max_batch)`` batches: the one that is computed and the
        full ones that wait, each taking the exponentially weighted mean of the batches so far. An idle engine starts
        at once, however slow its batches were: else one slow batch could keep every request away from it.
        """
        if self._batch_seconds.value is None:
            return None
        ahead = len(self._waiting) // self._max_batch + self._computing
        return ahead * self._batch_seconds.value

    def start(self) -> None:
        """Start the worker; needs a running event loop."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="critic-engine")
        self._worker = asyncio.create_task(self._work(self._thread))

    async def stop(self) -> None:
        """Refuse waiting requests (NotReadyError) and end the worker after its batch."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)
        for waiting in self._waiting:
            if not waiting.result.done():
                waiting.result.set_exception(NotReadyError("the critic is stopping", "draining"))
        self._waiting.clear()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.shutdown)

    async def submit(self, item: Item) -> Result:
        """The result of ``item``. When the caller is cancelled, the item is dropped, or no longer wanted in its batch.

        Raises SaturatedError when ``max_queue`` requests wait, EngineError when the batch failed, and NotReadyError
        when the worker is not running.
        """
        if not self.running:
            raise NotReadyError("the engine is not running", "unhealthy")
        if len(self._waiting) >= self._max_queue:
            raise SaturatedError(f"{self._max_queue} requests wait already; try again later")
        loop = asyncio.get_running_loop()
        waiting = _Waiting[Item, Result](item, loop.time(), loop.create_future())
        self._waiting.append(waiting)
        self._signal()
        try:
            return await waiting.result
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
                self._signal()

    def _signal(self) -> None:
        for event, reached in ((self._some, bool(self._waiting)), (self._full, len(self._waiting) >= self._max_batch)):
            if reached:
                event.set()
            else:
                event.clear()

    async def _next_batch(self) -> list[_Waiting[Item, Result]]:
        while not self._waiting:
            await self._some.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._waiting[0].arrived + self._wait_seconds):
                await self._full.wait()
        if not self._waiting:
            return []
        size = self._size(self._waiting[0].item)
        # Sorting keeps the order of equals: the oldest first.
        nearest = sorted(self._waiting, key=lambda waiting: abs(self._size(waiting.item) - size))
        batch = nearest[: self._max_batch]
        for waiting in batch:
            self._waiting.remove(waiting)
        self._signal()
        return [waiting for waiting in batch if not waiting.result.done()]

    async def _work(self, thread: ThreadPoolExecutor) -> None:
        while True:
            batch = await self._next_batch()
            if batch:
                await self._compute(thread, batch)

    async def _compute(self, thread: ThreadPoolExecutor, batch: list[_Waiting[Item, Result]]) -> None:
        items = [waiting.item for waiting in batch]
        started, self._computing = self._clock(), True

        def wanted(index: int) -> bool:
            return not batch[index].result.done()

        computing = asyncio.get_running_loop().run_in_executor(thread, self._run, items, wanted)
        try:
            await asyncio.wait({computing})
        finally:
            # Only stop() interrupts the wait; a thread cannot be interrupted, and its results are still wanted.
            await asyncio.wait({computing})
            self._computing = False
            # A batch that broke off because nobody wanted it does not measure the time of a batch.
            if any(not waiting.result.done() for waiting in batch):
                self._batch_seconds.add(self._clock() - started)
            self._deliver(batch, computing)

    def _deliver(self, batch: list[_Waiting[Item, Result]], computing: asyncio.Future[list[Result]]) -> None:
        pending = [waiting for waiting in batch if not waiting.result.done()]
        failure = computing.exception()
        if failure is None and len(computing.result()) != len(batch):
            failure = RuntimeError(f"{len(computing.result())} results for {len(batch)} items")
        if failure is not None:
            _log.error("batch failed", batch=len(batch), exc_info=failure)
            for waiting in pending:
                error = EngineError(f"the critic's engine failed: {type(failure).__name__}: {failure}")
                error.__cause__ = failure
                waiting.result.set_exception(error)
            return
        for waiting, result in zip(batch, computing.result(), strict=True):
            if not waiting.result.done():
                waiting.result.set_result(result)
