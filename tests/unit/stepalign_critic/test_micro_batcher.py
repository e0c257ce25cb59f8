"""The micro-batcher with fake compute functions: grouping, bounds, failures, cancellation, stopping."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from stepalign_critic.backends.micro_batcher import MicroBatcher, Wanted
from stepalign_critic.errors import EngineError, NotReadyError, SaturatedError


class Doubler:
    """Doubles numbers and remembers its batches. With a gate, it waits in its thread until the gate opens."""

    def __init__(self, *, gated: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        if not gated:
            self.gate.set()

    def __call__(self, items: list[int], wanted: Wanted) -> list[int]:
        self.batches.append(items)
        assert self.gate.wait(5)
        return [2 * item for item in items]


def run_with(
    compute: Callable[[list[int], Wanted], list[int]],
    test: Callable[[MicroBatcher[int, int]], Awaitable[Any]],
    **options: Any,
) -> Any:
    settings = {"max_batch": 4, "max_queue": 8, "wait_seconds": 0.02, **options}

    async def main() -> Any:
        batcher = MicroBatcher[int, int](compute, **settings)
        batcher.start()
        try:
            async with asyncio.timeout(10):
                return await test(batcher)
        finally:
            await batcher.stop()

    return asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_requests_within_the_window_are_batched_and_answered_in_order() -> None:
    compute = Doubler()
    results = run_with(compute, lambda batcher: asyncio.gather(*(batcher.submit(i) for i in range(3))))
    assert results == [0, 2, 4]
    assert compute.batches == [[0, 1, 2]]


def test_a_full_batch_does_not_wait_for_the_window() -> None:
    started = time.perf_counter()
    run_with(Doubler(), lambda batcher: asyncio.gather(*(batcher.submit(i) for i in range(4))), wait_seconds=5)
    assert time.perf_counter() - started < 2


def test_a_lone_request_is_computed_after_the_window() -> None:
    started = time.perf_counter()
    assert run_with(Doubler(), lambda batcher: batcher.submit(21), wait_seconds=0.05) == 42
    assert time.perf_counter() - started >= 0.045


def test_no_batch_is_larger_than_max_batch() -> None:
    compute = Doubler()
    run_with(compute, lambda batcher: asyncio.gather(*(batcher.submit(i) for i in range(7))), max_batch=3)
    assert compute.batches == [[0, 1, 2], [3, 4, 5], [6]]


def test_requests_that_arrive_during_a_batch_form_the_next_one() -> None:
    compute = Doubler(gated=True)

    async def test(batcher: MicroBatcher[int, int]) -> None:
        first = asyncio.create_task(batcher.submit(0))
        await until(lambda: len(compute.batches) == 1)
        later = [asyncio.create_task(batcher.submit(i)) for i in (1, 2)]
        await asyncio.sleep(0.05)
        assert len(compute.batches) == 1
        compute.gate.set()
        assert await asyncio.gather(first, *later) == [0, 2, 4]

    run_with(compute, test)
    assert compute.batches == [[0], [1, 2]]


def test_the_oldest_goes_with_those_nearest_to_it_in_size() -> None:
    compute = Doubler(gated=True)

    async def test(batcher: MicroBatcher[int, int]) -> list[int]:
        first = asyncio.create_task(batcher.submit(1))
        await until(lambda: compute.batches == [[1]])
        later = [asyncio.create_task(batcher.submit(size)) for size in (50, 9, 500, 45, 60, 10, 48)]
        await asyncio.sleep(0.05)
        compute.gate.set()
        return list(await asyncio.gather(first, *later))

    results = run_with(compute, test, size=lambda item: item)
    assert compute.batches == [[1], [50, 48, 45, 60], [9, 10, 500]]
    assert results == [2, 100, 18, 1000, 90, 120, 20, 96]


def test_a_request_over_max_queue_is_refused_and_the_others_are_answered() -> None:
    compute = Doubler(gated=True)

    async def test(batcher: MicroBatcher[int, int]) -> list[int]:
        running = asyncio.create_task(batcher.submit(0))
        await until(lambda: len(compute.batches) == 1)
        waiting = [asyncio.create_task(batcher.submit(i)) for i in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(SaturatedError, match="2 requests wait"):
            await batcher.submit(3)
        compute.gate.set()
        return await asyncio.gather(running, *waiting)

    assert run_with(compute, test, max_queue=2) == [0, 2, 4]


def test_a_failed_batch_fails_all_of_its_requests_and_no_later_one() -> None:
    def compute(items: list[int], _: Wanted) -> list[int]:
        if 13 in items:
            raise RuntimeError("out of memory")
        return items

    async def test(batcher: MicroBatcher[int, int]) -> None:
        failed = await asyncio.gather(*(batcher.submit(i) for i in (12, 13, 14)), return_exceptions=True)
        assert [type(error) for error in failed] == [EngineError] * 3
        assert all("out of memory" in str(error) for error in failed)
        assert await batcher.submit(15) == 15
        assert batcher.running

    run_with(compute, test)


def test_a_wrong_number_of_results_is_an_engine_error() -> None:
    async def test(batcher: MicroBatcher[int, int]) -> None:
        failed = await asyncio.gather(batcher.submit(1), batcher.submit(2), return_exceptions=True)
        assert [type(error) for error in failed] == [EngineError] * 2

    run_with(lambda items, _: items[:1], test)


def test_a_cancelled_request_leaves_before_its_batch_and_frees_its_place() -> None:
    compute = Doubler(gated=True)

    async def test(batcher: MicroBatcher[int, int]) -> None:
        running = asyncio.create_task(batcher.submit(0))
        await until(lambda: len(compute.batches) == 1)
        dropped = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0)
        dropped.cancel()
        await asyncio.gather(dropped, return_exceptions=True)
        kept = asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0)
        compute.gate.set()
        assert await asyncio.gather(running, kept) == [0, 4]

    run_with(compute, test, max_queue=1)
    assert compute.batches == [[0], [2]]


def test_the_worker_survives_the_cancellation_of_the_only_request() -> None:
    async def test(batcher: MicroBatcher[int, int]) -> int:
        lone = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0)
        lone.cancel()
        await asyncio.sleep(0.05)
        return await batcher.submit(2)

    assert run_with(Doubler(), test) == 4


def test_cancelling_a_request_that_is_computed_does_not_disturb_its_batch() -> None:
    compute = Doubler(gated=True)

    async def test(batcher: MicroBatcher[int, int]) -> None:
        first, second = (asyncio.create_task(batcher.submit(i)) for i in (1, 2))
        await until(lambda: len(compute.batches) == 1)
        first.cancel()
        await asyncio.sleep(0)
        compute.gate.set()
        assert await second == 4

    run_with(compute, test)


def test_a_batch_is_told_which_of_its_items_nobody_waits_for_any_more() -> None:
    started, looked = threading.Event(), threading.Event()
    seen: list[list[bool]] = []

    def compute(items: list[int], wanted: Wanted) -> list[int]:
        seen.append([wanted(i) for i in range(len(items))])
        started.set()
        assert looked.wait(5)
        seen.append([wanted(i) for i in range(len(items))])
        return items

    async def test(batcher: MicroBatcher[int, int]) -> None:
        first, second = (asyncio.create_task(batcher.submit(i)) for i in (1, 2))
        await until(started.is_set)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        looked.set()
        assert await second == 2

    run_with(compute, test)
    assert seen == [[True, True], [False, True]]


def test_stopping_finishes_the_running_batch_and_refuses_what_waits() -> None:
    compute = Doubler(gated=True)

    async def test(batcher: MicroBatcher[int, int]) -> None:
        running = asyncio.create_task(batcher.submit(1))
        await until(lambda: len(compute.batches) == 1)
        waiting = asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(batcher.stop())
        await asyncio.sleep(0.01)
        compute.gate.set()
        await stopping
        assert await running == 2
        with pytest.raises(NotReadyError):
            await waiting
        with pytest.raises(NotReadyError):
            await batcher.submit(3)

    run_with(compute, test)
    assert compute.batches == [[1]]
