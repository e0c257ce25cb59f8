"""Ending with work in hand that takes its time to be given up."""

from __future__ import annotations

import asyncio

import pytest

from stepalign_critic.backends.program import ProgramBackend
from stepalign_critic.errors import NotReadyError
from stepalign_critic.lifecycle import Lifecycle


def test_what_was_given_up_may_be_given_up_again_while_it_still_ends() -> None:
    async def main() -> None:
        lifecycle = Lifecycle(ProgramBackend("none", lambda question, attempt: "", "r"))
        ending, ended = asyncio.Event(), asyncio.Event()

        async def slow() -> None:
            async with lifecycle.answering():
                try:
                    await asyncio.sleep(60)
                finally:
                    ending.set()
                    await ended.wait()

        async def other() -> None:
            async with lifecycle.answering():
                await asyncio.sleep(60)

        first = asyncio.create_task(slow())
        await asyncio.sleep(0)
        lifecycle.give_up()
        await ending.wait()
        second = asyncio.create_task(other())
        await asyncio.sleep(0)
        await lifecycle.finish(0.01)
        with pytest.raises(NotReadyError, match="given this request up"):
            await second
        ended.set()
        with pytest.raises(NotReadyError, match="given this request up"):
            await first

    asyncio.run(main())


def test_an_error_of_the_work_is_not_taken_for_the_end() -> None:
    async def main() -> None:
        lifecycle = Lifecycle(ProgramBackend("none", lambda question, attempt: "", "r"))
        with pytest.raises(TimeoutError, match="its own"):
            async with lifecycle.answering():
                raise TimeoutError("its own")
        await lifecycle.finish(10)

    asyncio.run(main())
