"""A response's head waits for its body, and nothing is lost or put out of order for it."""

from __future__ import annotations

import asyncio
from typing import Any

from stepalign_critic.http.joined_writes import JoinedWrites

HEAD, BODY, LONG = b"HTTP/1.1 200 OK\r\n\r\n", b"{}", b"x" * 100_000


class Recorded(asyncio.Transport):
    """What the event loop's transport was told, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []
        self.closing = False

    def write(self, data: Any) -> None:
        self.told.append(bytes(data))

    def write_eof(self) -> None:
        self.told.append("eof")

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True
        self.told.append("close")


async def told_by(act: Any) -> tuple[list[Any], list[Any]]:
    """What is told at once, and what after the loop's next turn."""
    transport = Recorded()
    act(JoinedWrites(transport, asyncio.get_running_loop()))
    at_once = list(transport.told)
    await asyncio.sleep(0)
    return at_once, transport.told


def told(act: Any) -> tuple[list[Any], list[Any]]:
    return asyncio.run(told_by(act))


def test_a_head_and_its_body_are_one_write() -> None:
    def answer(transport: JoinedWrites) -> None:
        transport.write(HEAD)
        transport.write(BODY)

    assert told(answer) == ([HEAD + BODY], [HEAD + BODY])


def test_a_short_write_alone_goes_out_with_the_next_turn() -> None:
    assert told(lambda transport: transport.write(HEAD)) == ([], [HEAD])


def test_a_long_write_does_not_wait() -> None:
    assert told(lambda transport: transport.write(LONG)) == ([LONG], [LONG])


def test_pieces_keep_their_order() -> None:
    def stream(transport: JoinedWrites) -> None:
        for piece in (HEAD, LONG, BODY, LONG, BODY):
            transport.write(piece)

    _, all_told = told(stream)
    assert b"".join(all_told) == HEAD + LONG + BODY + LONG + BODY


def test_several_pieces_at_once_come_after_what_is_held() -> None:
    def answer(transport: JoinedWrites) -> None:
        transport.write(HEAD)
        transport.writelines([BODY, BODY])

    assert told(answer)[1] == [HEAD + BODY + BODY]


def test_closing_sends_what_is_held() -> None:
    def answer(transport: JoinedWrites) -> None:
        transport.write(HEAD)
        transport.close()

    assert told(answer)[1] == [HEAD, "close"]


def test_the_end_comes_after_what_is_held() -> None:
    def answer(transport: JoinedWrites) -> None:
        transport.write(HEAD)
        transport.write_eof()

    assert told(answer)[1] == [HEAD, "eof"]


def test_nothing_is_written_to_a_connection_that_closes_meanwhile() -> None:
    async def lose() -> list[Any]:
        transport = Recorded()
        JoinedWrites(transport, asyncio.get_running_loop()).write(HEAD)
        transport.closing = True
        await asyncio.sleep(0)
        return transport.told

    assert asyncio.run(lose()) == []
