"""The throughput of N replicas behind the balancer in closed loops, beside one replica without it."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from benchmarks.wire import Connection, expect_critique


@dataclass(frozen=True)
class LoadSettings:
    """``loops_per_replica`` clients per replica, each with one request open at any time."""

    loops_per_replica: int = 4
    warm_up_seconds: float = 2.0
    seconds: float = 10.0


@dataclass(frozen=True)
class Throughput:
    """``client_cpu`` is the share of one core that this program took; ``machine_cpu`` of all cores by everybody."""

    per_second: float
    requests: int
    client_cpu: float
    machine_cpu: float


def measure(address: str, replicas: int, requests: list[bytes], settings: LoadSettings) -> Throughput:
    """The rate at which ``address`` answers ``loops_per_replica · replicas`` closed loops."""
    loops = settings.loops_per_replica * replicas
    stop = threading.Event()
    with ThreadPoolExecutor(loops) as pool:
        running = [pool.submit(_loop, address, requests[i:] + requests[:i], stop) for i in range(loops)]
        try:
            time.sleep(settings.warm_up_seconds)
            begin, client, machine = time.monotonic(), time.process_time(), _machine_ticks()
            time.sleep(settings.seconds)
            end = time.monotonic()
            client_cpu = (time.process_time() - client) / (end - begin)
            busy, total = (after - before for after, before in zip(_machine_ticks(), machine, strict=True))
        finally:
            stop.set()
        windows = [[t for t in loop.result() if begin <= t < end] for loop in running]
    return Throughput(sum(map(_rate, windows)), sum(map(len, windows)), client_cpu, busy / total)


def _loop(address: str, requests: list[bytes], stop: threading.Event) -> list[float]:
    """One client; the times of its answers."""
    answered: list[float] = []
    with Connection(address) as connection:
        for request in itertools.cycle(requests):
            if stop.is_set():
                break
            answer = connection.exchange(request)
            answered.append(time.monotonic())
            expect_critique(answer)
    return answered


def _rate(answered: list[float]) -> float:
    """Answers a second of one loop, from its first to its last in the window.

    Counting those in the window would be wrong by up to one answer per loop, which come in step: 2.5 % of ten seconds.
    """
    if len(answered) < 2:
        return 0.0
    return (len(answered) - 1) / (answered[-1] - answered[0])


def _machine_ticks() -> tuple[int, int]:
    """Busy and all ticks of all cores since the machine started."""
    with open("/proc/stat", encoding="ascii") as stat:
        ticks = [int(word) for word in stat.readline().split()[1:9]]
    idle = ticks[3] + ticks[4]
    return sum(ticks) - idle, sum(ticks)
