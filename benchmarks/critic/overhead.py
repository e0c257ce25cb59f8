"""The time that the service adds to its engine's, on one kept connection, beside that of a bare FastAPI route.

The overhead of a request is its latency at the client less the time that the engine itself took for it, which every
answer tells (:mod:`benchmarks.critic.engine`). Service and route get the same requests by turns.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass

from benchmarks.critic.load import Target
from benchmarks.errors import BenchError
from benchmarks.wire import Connection


@dataclass(frozen=True)
class OverheadSettings:
    engine_seconds: float = 0.005
    blocks: int = 20
    pairs_per_block: int = 100
    warm_up_pairs: int = 300


@dataclass(frozen=True)
class Overhead:
    """Milliseconds. ``block_range_ms`` holds the least and the greatest median of a block."""

    overhead_p50_ms: float
    overhead_p99_ms: float
    block_range_ms: tuple[float, float]
    latency_p50_ms: float
    engine_p50_ms: float
    requests: int


@dataclass(frozen=True)
class _Sample:
    latency_ms: float
    engine_ms: float

    @property
    def overhead_ms(self) -> float:
        return self.latency_ms - self.engine_ms


def measure_overhead(service: Target, bare: Target, settings: OverheadSettings) -> tuple[Overhead, Overhead]:
    """The overhead of the service and that of the bare route. Raises BenchError on an answer that is none."""
    with _connected(service) as to_service, _connected(bare) as to_bare:
        sides = ((service, to_service), (bare, to_bare))
        _block(sides, settings.warm_up_pairs)
        blocks = [_block(sides, settings.pairs_per_block) for _ in range(settings.blocks)]
    of_service, of_bare = zip(*blocks, strict=True)
    return _overhead(of_service), _overhead(of_bare)


def _connected(target: Target) -> Connection:
    return Connection(target.server.host, target.server.port)


def _block(
    sides: tuple[tuple[Target, Connection], tuple[Target, Connection]], pairs: int
) -> tuple[list[_Sample], list[_Sample]]:
    samples: tuple[list[_Sample], list[_Sample]] = ([], [])
    for pair in range(pairs):
        # The second one may find the processor's caches warm.
        for side in (0, 1) if pair % 2 else (1, 0):
            samples[side].append(_sample(*sides[side]))
    return samples


def _sample(target: Target, connection: Connection) -> _Sample:
    request = next(target.requests)
    begin = time.perf_counter_ns()
    answer = connection.exchange(request)
    latency_ms = (time.perf_counter_ns() - begin) / 1e6
    whole = answer.head + answer.body
    if answer.status != 200 or any(part not in whole for part in target.expected):
        raise BenchError(f"an answer is not 200 with {target.expected}: {whole[:1000]!r}")
    return _Sample(latency_ms, json.loads(answer.body)["usage"]["completion_tokens"] / 1000)


def _overhead(blocks: tuple[list[_Sample], ...]) -> Overhead:
    samples = [sample for block in blocks for sample in block]
    overheads = [sample.overhead_ms for sample in samples]
    medians = [statistics.median(sample.overhead_ms for sample in block) for block in blocks]
    return Overhead(
        overhead_p50_ms=statistics.median(overheads),
        overhead_p99_ms=statistics.quantiles(overheads, n=100)[-1],
        block_range_ms=(min(medians), max(medians)),
        latency_p50_ms=statistics.median(sample.latency_ms for sample in samples),
        engine_p50_ms=statistics.median(sample.engine_ms for sample in samples),
        requests=len(samples),
    )
