"""The bounded queue before an engine that batches by itself, by a clock that tests set."""

from __future__ import annotations

import asyncio

import pytest

from stepalign_critic.backends.admission import Admission
from stepalign_critic.errors import EngineError, SaturatedError


class Story:
    """An admission of two places and three that wait, and the requests that hold or wait for them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.admission = Admission(2, 3, lambda: self.now)
        self.tasks: list[asyncio.Task[None]] = []
        self.ends: list[asyncio.Event] = []

    async def come(self, count: int = 1, error: Exception | None = None) -> None:
        for _ in range(count):
            end = asyncio.Event()
            self.ends.append(end)
            self.tasks.append(asyncio.create_task(self._hold(end, error)))
        await self.settle()

    async def _hold(self, end: asyncio.Event, error: Exception | None) -> None:
        async with self.admission.place():
            await end.wait()
            if error is not None:
                raise error

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def end(self, index: int, *, after: float) -> None:
        self.now += after
        self.ends[index].set()
        await self.settle()

    @property
    def expected(self) -> float | None:
        return self.admission.expected_wait_seconds()


def test_the_wait_is_the_share_of_a_mean_answer_for_each_that_is_ahead() -> None:
    async def main() -> None:
        story = Story()
        await story.come(2)
        assert story.expected is None, "no answer was measured yet"
        await story.end(0, after=8.0)
        assert story.expected == 0.0, "one place is free"
        await story.come()
        assert story.expected == 1 * 8.0 / 2
        await story.come(2)
        assert story.expected == 3 * 8.0 / 2
        await story.end(1, after=4.0)  # it held its place for 12 s
        assert story.expected == 2 * (8.0 + 0.3 * 4.0) / 2
        for end in story.ends:
            end.set()
        await asyncio.gather(*story.tasks)
        assert story.expected == 0.0

    asyncio.run(main())


def test_what_fails_or_is_given_up_is_not_measured() -> None:
    async def main() -> None:
        story = Story()
        await story.come(1, EngineError("the engine broke"))
        await story.come()
        await story.end(0, after=1.0)
        story.tasks[1].cancel()
        await asyncio.gather(*story.tasks, return_exceptions=True)
        assert story.expected is None
        await story.come(2)
        await story.end(2, after=3.0)
        assert story.expected == 0.0, "every place was given back"

    asyncio.run(main())


def test_one_more_than_may_wait_is_refused_and_one_that_leaves_makes_room() -> None:
    async def main() -> None:
        # A request that is let in to wait would wait for ever.
        async with asyncio.timeout(10):
            story = Story()
            await story.come(5)
            with pytest.raises(SaturatedError, match="3 requests wait already, the limit is 3"):
                async with story.admission.place():
                    pass
            story.tasks[4].cancel()
            await story.settle()
            await story.come()
            for end in story.ends:
                end.set()
            results = await asyncio.gather(*story.tasks, return_exceptions=True)
            assert [type(result) for result in results].count(asyncio.CancelledError) == 1
            assert results.count(None) == 5

    asyncio.run(main())
