"""Closed loops from one thread: so many connections, each with one request open at any time.

A full HTTP client takes about as long for a request as the service does; on two cores it would measure itself.
This one sends bytes that are ready and looks for the end of the answer, and tells the share of a core that it took.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.critic.processes import Server
from benchmarks.errors import BenchError

_OK = b"HTTP/1.1 200"


@dataclass(frozen=True)
class LoadSettings:
    connections: int = 32
    rounds: int = 9
    seconds: float = 4.0
    warm_up_seconds: float = 1.0


@dataclass(frozen=True)
class Target:
    """A server, and the text that each of its answers must hold besides status 200 for its figures to count.

    ``requests`` are its own: shared with another target, some might be answered from its cache.
    """

    server: Server
    expected: Sequence[bytes]
    requests: Iterator[bytes]


@dataclass(frozen=True)
class Load:
    """Latencies in milliseconds, from a request's first byte out to its answer's last byte in.

    ``client_cpu`` is the share of one core that this program took.
    """

    per_second: float
    p50_ms: float
    p99_ms: float
    requests: int
    client_cpu: float


@dataclass(frozen=True)
class Rounds:
    """The same load in every round; medians leave out disturbances by other programs."""

    loads: list[Load]

    @property
    def per_second(self) -> float:
        return statistics.median(load.per_second for load in self.loads)

    @property
    def p99_ms(self) -> float:
        return statistics.median(load.p99_ms for load in self.loads)

    def ratio_to(self, peer: Rounds) -> float:
        """The median over the rounds of this throughput ÷ the peer's in the same round."""
        pairs = zip(self.loads, peer.loads, strict=True)
        return statistics.median(ours.per_second / theirs.per_second for ours, theirs in pairs)


def measure_by_turns(targets: Mapping[str, Target], settings: LoadSettings) -> dict[str, Rounds]:
    """Load each target in every round, the first one last in the next."""
    names = list(targets)
    loads: dict[str, list[Load]] = {name: [] for name in names}
    for _ in range(settings.rounds):
        for name in names:
            loads[name].append(asyncio.run(_measure(targets[name], settings)))
        names.reverse()
    return {name: Rounds(of_name) for name, of_name in loads.items()}


async def _measure(target: Target, settings: LoadSettings) -> Load:
    """Raises BenchError on an unexpected answer."""
    running = asyncio.get_running_loop()
    stopped: asyncio.Future[None] = running.create_future()
    host, port = target.server.host, target.server.port
    opened = [
        await running.create_connection(lambda: _Loop(target, stopped), host, port) for _ in range(settings.connections)
    ]
    loops = [loop for _, loop in opened]
    try:
        await _unless_stopped(stopped, settings.warm_up_seconds)
        for loop in loops:
            loop.milliseconds.clear()
        begin, cpu = time.perf_counter(), time.process_time()
        await _unless_stopped(stopped, settings.seconds)
        elapsed, cpu = time.perf_counter() - begin, time.process_time() - cpu
        answered = [sample for loop in loops for sample in loop.milliseconds]
    finally:
        stopped.cancel()
        for transport, _ in opened:
            transport.abort()
    if len(answered) < 2:
        raise BenchError(f"{target.server.url} gave {len(answered)} answers in {settings.seconds:g} s")
    return Load(
        per_second=len(answered) / elapsed,
        p50_ms=statistics.median(answered),
        p99_ms=statistics.quantiles(answered, n=100)[-1],
        requests=len(answered),
        client_cpu=cpu / elapsed,
    )


async def _unless_stopped(stopped: asyncio.Future[None], seconds: float) -> None:
    await asyncio.wait([stopped], timeout=seconds)
    if stopped.done():
        stopped.result()


class _Loop(asyncio.Protocol):
    """One connection. ``stopped`` gets the error that ends the measurement, or is cancelled at its end."""

    def __init__(self, target: Target, stopped: asyncio.Future[None]) -> None:
        self._requests = target.requests
        self._expected = target.expected
        self._stopped = stopped
        self._received = bytearray()
        self._length: int | None = None
        self._sent_at = 0.0
        self._transport: asyncio.Transport | None = None
        self.milliseconds: list[float] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._length is None:
            self._length = _whole_length(self._received)
        if self._length is None or len(self._received) < self._length:
            return
        self.milliseconds.append((time.perf_counter() - self._sent_at) * 1000)
        if not self._received.startswith(_OK) or any(part not in self._received for part in self._expected):
            self._stop(f"an answer is not 200 with {self._expected}: {bytes(self._received[:1000])!r}")
        else:
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(f"a server closed a connection: {exc}")

    def _send(self) -> None:
        assert self._transport is not None
        self._received.clear()
        self._length = None
        self._sent_at = time.perf_counter()
        self._transport.write(next(self._requests))

    def _stop(self, message: str) -> None:
        if not self._stopped.done():
            self._stopped.set_exception(BenchError(message))


def _whole_length(received: bytearray) -> int | None:
    """The bytes of an answer with its head; None until its head is there. All that is measured send a length."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    _, _, rest = bytes(received[:end]).lower().partition(b"\r\ncontent-length:")
    return end + 4 + int(rest.partition(b"\r\n")[0])
