"""How long the micro-batcher expects a request to wait: from what waits and how long batches took, by a set clock."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from stepalign_critic.backends.micro_batcher import MicroBatcher, Wanted

Batcher = MicroBatcher[float, float]


def run(test: Callable[[Batcher], Awaitable[None]], gate: threading.Event | None = None) -> None:
    """Items are the seconds that their batch takes; a batch of 0 s waits for ``gate``."""
    now = [1000.0]

    def compute(items: list[float], _: Wanted) -> list[float]:
        now[0] += max(items)
        if max(items) < 0:
            raise RuntimeError("the engine broke")
        if max(items) == 0 and gate is not None:
            assert gate.wait(10)
        return items

    async def main() -> None:
        batcher = Batcher(compute, max_batch=2, max_queue=16, wait_seconds=0, clock=lambda: now[0])
        batcher.start()
        try:
            await test(batcher)
        finally:
            await batcher.stop()

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def test_nothing_is_expected_before_a_batch_was_measured() -> None:
    gate = threading.Event()

    async def test(batcher: Batcher) -> None:
        assert batcher.expected_wait_seconds() is None
        running = asyncio.create_task(batcher.submit(0.0))
        await asyncio.sleep(0.01)
        assert batcher.expected_wait_seconds() is None
        gate.set()
        await running
        assert batcher.expected_wait_seconds() is not None

    run(test, gate)


def test_an_idle_engine_starts_at_once_however_slow_it_was() -> None:
    async def test(batcher: Batcher) -> None:
        await batcher.submit(600.0)
        assert batcher.expected_wait_seconds() == 0.0

    run(test)


def test_the_wait_is_the_running_batch_and_the_full_ones_that_wait() -> None:
    gate = threading.Event()

    async def test(batcher: Batcher) -> None:
        await batcher.submit(10.0)
        waiting = [asyncio.create_task(batcher.submit(0.0))]
        await until(lambda: batcher.expected_wait_seconds() == 10.0)
        expected: list[float | None] = []
        for _ in range(5):
            expected.append(batcher.expected_wait_seconds())
            waiting.append(asyncio.create_task(batcher.submit(0.0)))
            await asyncio.sleep(0)
        assert expected == [10.0, 10.0, 20.0, 20.0, 30.0]
        gate.set()
        await asyncio.gather(*waiting)

    run(test, gate)


def test_recent_batches_weigh_more_and_a_failed_one_counts() -> None:
    gate = threading.Event()

    async def test(batcher: Batcher) -> None:
        await batcher.submit(10.0)
        await batcher.submit(20.0)
        with pytest.raises(Exception, match="the engine broke"):
            await batcher.submit(-5.0)
        running = asyncio.create_task(batcher.submit(0.0))
        await until(lambda: batcher.expected_wait_seconds() != 0.0)
        after_two = 0.7 * 10.0 + 0.3 * 20.0
        assert batcher.expected_wait_seconds() == pytest.approx(0.7 * after_two + 0.3 * -5.0)
        gate.set()
        await running

    run(test, gate)


def test_a_batch_that_nobody_waits_for_any_more_is_not_measured() -> None:
    """It breaks off early, and would make the engine look fast."""
    gate = threading.Event()

    async def test(batcher: Batcher) -> None:
        await batcher.submit(10.0)
        dropped = asyncio.create_task(batcher.submit(0.0))
        await until(lambda: batcher.expected_wait_seconds() == 10.0)
        dropped.cancel()
        await asyncio.gather(dropped, return_exceptions=True)
        gate.set()
        await until(lambda: batcher.expected_wait_seconds() == 0.0)
        gate.clear()
        running = asyncio.create_task(batcher.submit(0.0))
        await until(lambda: batcher.expected_wait_seconds() != 0.0)
        assert batcher.expected_wait_seconds() == 10.0
        gate.set()
        await running

    run(test, gate)
