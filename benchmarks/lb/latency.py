"""Time that the balancer adds to a request: the same request to the same replica, through it and past it, by turns."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass

from benchmarks.errors import BenchError
from benchmarks.wire import Connection

_BOOTSTRAP_SAMPLES = 2000


@dataclass(frozen=True)
class LatencySettings:
    blocks: int = 20
    pairs_per_block: int = 200
    warm_up_pairs: int = 400


@dataclass(frozen=True)
class Comparison:
    """Milliseconds. ``interval`` holds 95 % of the overheads of blocks drawn anew from the measured ones."""

    overhead_p50_ms: float
    interval_ms: tuple[float, float]
    overhead_p99_ms: float
    direct_p50_ms: float
    direct_p99_ms: float
    balanced_p50_ms: float
    balanced_p99_ms: float
    pairs: int
    request_bytes: int


@dataclass(frozen=True)
class _Block:
    direct: list[float]
    balanced: list[float]

    @property
    def overhead(self) -> float:
        return statistics.median(self.balanced) - statistics.median(self.direct)


def compare(replica: str, balancer: str, request: bytes, settings: LatencySettings) -> Comparison:
    """Send ``request`` by turns to the addresses ``replica`` and ``balancer``, on one kept connection each."""
    with Connection(replica) as direct, Connection(balancer) as balanced:
        _measure_block(direct, balanced, request, settings.warm_up_pairs)
        blocks = [_measure_block(direct, balanced, request, settings.pairs_per_block) for _ in range(settings.blocks)]
    all_direct = [sample for block in blocks for sample in block.direct]
    all_balanced = [sample for block in blocks for sample in block.balanced]
    direct_p50, balanced_p50 = statistics.median(all_direct), statistics.median(all_balanced)
    direct_p99, balanced_p99 = _p99(all_direct), _p99(all_balanced)
    return Comparison(
        overhead_p50_ms=balanced_p50 - direct_p50,
        interval_ms=_interval([block.overhead for block in blocks]),
        overhead_p99_ms=balanced_p99 - direct_p99,
        direct_p50_ms=direct_p50,
        direct_p99_ms=direct_p99,
        balanced_p50_ms=balanced_p50,
        balanced_p99_ms=balanced_p99,
        pairs=len(all_direct),
        request_bytes=len(request),
    )


def _measure_block(direct: Connection, balanced: Connection, request: bytes, pairs: int) -> _Block:
    block = _Block([], [])
    sides = [(direct, block.direct), (balanced, block.balanced)]
    for _ in range(pairs):
        for connection, samples in sides:
            samples.append(_milliseconds(connection, request))
        # The second one may find the replica's caches warm.
        sides.reverse()
    return block


def _milliseconds(connection: Connection, request: bytes) -> float:
    begin = time.perf_counter_ns()
    answer = connection.exchange(request)
    elapsed = time.perf_counter_ns() - begin
    if answer.status != 200:
        raise BenchError(f"a request of the latency measurement was answered with {answer.status}: {answer.body!r}")
    return elapsed / 1e6


def _interval(overheads: list[float]) -> tuple[float, float]:
    rng = random.Random(0)
    drawn = [statistics.median(rng.choices(overheads, k=len(overheads))) for _ in range(_BOOTSTRAP_SAMPLES)]
    cuts = statistics.quantiles(drawn, n=40)
    return cuts[0], cuts[-1]


def _p99(samples: list[float]) -> float:
    return statistics.quantiles(samples, n=100)[-1]
