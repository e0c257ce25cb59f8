"""The three measurements, each on a fresh stack: counters start at nothing, and no replica has a past."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lb.churn import Churn, ChurnSettings, run_churn
from benchmarks.lb.haproxy import version
from benchmarks.lb.latency import Comparison, LatencySettings, compare
from benchmarks.lb.scaling import LoadSettings, Throughput, measure
from benchmarks.lb.stack import Capacity, Stack
from benchmarks.lb.workload import lab_requests, long_request
from benchmarks.wire import request_bytes

REPLICAS = (1, 2, 4, 8)
IMMEDIATE = Capacity(slots=4, seconds=0.0)
FIXED = Capacity(slots=4, seconds=0.25)
# Loads for so long that a new replica is watched before it is ready.
LOADING = Capacity(slots=4, seconds=0.25, load_seconds=3.0)

_DIFFERENT_REQUESTS = 100


@dataclass(frozen=True)
class Overhead:
    """``critique`` is the figure; on a request for ``health_live`` the critic itself spends almost nothing."""

    critique: Comparison
    health_live: Comparison
    haproxy_version: str


@dataclass(frozen=True)
class Scaling:
    """``direct`` is one replica without the balancer, the peer of all others; ``balanced`` is by number of replicas."""

    direct: Throughput
    balanced: dict[int, Throughput]

    def efficiency(self) -> dict[str, float]:
        """The share of N times the peer's throughput."""
        return {str(n): through.per_second / (n * self.direct.per_second) for n, through in self.balanced.items()}

    def of_capacity(self) -> dict[str, float]:
        """The share of the greatest throughput of N replicas."""
        return {str(n): through.per_second / (n * FIXED.per_second) for n, through in self.balanced.items()}


def measure_overhead(haproxy_cfg: Path, settings: LatencySettings) -> Overhead:
    """The time that the balancer adds to requests that the critic answers at once."""
    with Stack(IMMEDIATE, 1, haproxy_cfg) as stack:
        replica = stack.critics()[0].address
        body = long_request().model_dump_json().encode()
        critique = request_bytes("POST", "/v1/critiques", stack.api_key, body)
        live = request_bytes("GET", "/health/live")
        return Overhead(
            critique=compare(replica, stack.balancer, critique, settings),
            health_live=compare(replica, stack.balancer, live, settings),
            haproxy_version=version(stack.balancer),
        )


def measure_churn(haproxy_cfg: Path, settings: ChurnSettings) -> Churn:
    """Errors and delays of clients during changes."""
    with Stack(LOADING, 1, haproxy_cfg) as stack:
        return asyncio.run(run_churn(stack, settings))


def measure_scaling(haproxy_cfg: Path, settings: LoadSettings) -> Scaling:
    """Throughput without the balancer and with 1, 2, 4 and 8 replicas behind it."""
    with Stack(FIXED, 1, haproxy_cfg) as stack:
        bodies = [request.model_dump_json().encode() for request in lab_requests(_DIFFERENT_REQUESTS)]
        requests = [request_bytes("POST", "/v1/critiques", stack.api_key, body) for body in bodies]
        direct = measure(stack.critics()[0].address, 1, requests, settings)
        balanced: dict[int, Throughput] = {}
        for replicas in REPLICAS:
            stack.scale(replicas)
            stack.wait_until_up(replicas)
            balanced[replicas] = measure(stack.balancer, replicas, requests, settings)
        return Scaling(direct, balanced)
