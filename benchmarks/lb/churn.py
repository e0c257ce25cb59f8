"""Errors and delays of clients, the SDK's own as the trainer uses it, while replicas come, drain and die."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from structlog.testing import capture_logs

from benchmarks.lb.changes import add, drain, kill
from benchmarks.lb.haproxy import BackendState, backend_state
from benchmarks.lb.stack import Stack
from benchmarks.lb.workload import lab_requests
from benchmarks.wire import CRITIC_PORT
from stepalign.client import CriticClient
from stepalign.errors import StepalignError

_DIFFERENT_REQUESTS = 100
_Logs = list[MutableMapping[str, Any]]


@dataclass(frozen=True)
class ChurnSettings:
    """At least ``requests`` are sent, more if the changes take longer; ``settle_seconds`` pass after each change."""

    requests: int = 1500
    concurrency: int = 16
    settle_seconds: float = 2.0
    timeout_seconds: float = 120.0


@dataclass(frozen=True)
class Step:
    """One change and its cost. ``seconds`` are the change's own clock, see :mod:`benchmarks.lb.changes`."""

    change: str
    seconds: list[float]
    balancer_retries: int
    balancer_redispatches: int
    client_retries: int
    slowest_request_seconds: float


@dataclass(frozen=True)
class Churn:
    requests: int
    failures: list[str]
    client_retries: dict[str, int]
    balancer: BackendState
    steps: list[Step]

    def seconds(self, change: str) -> list[float]:
        """The clock of all changes with a name that begins with ``change``."""
        return [second for step in self.steps if step.change.startswith(change) for second in step.seconds]


@dataclass
class _Load:
    """The clients' view: seconds and end of each answered request, and the failures."""

    finish: bool = False
    sent: int = 0
    answered: list[tuple[float, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


async def run_churn(stack: Stack, settings: ChurnSettings) -> Churn:
    """Replicas 1 → 3 (added) → 2 (drained) → 1 (killed) → 3 (added) → 2 (killed), under load all the time."""
    load = _Load()
    url = f"http://{stack.balancer}:{CRITIC_PORT}"
    with capture_logs() as logs:
        async with CriticClient(url, api_key=stack.api_key, timeout=settings.timeout_seconds) as client:
            clients = [asyncio.create_task(_send(client, load, settings.requests)) for _ in range(settings.concurrency)]
            try:
                steps = await _change(stack, load, logs, settings.settle_seconds)
                load.finish = True
                await asyncio.gather(*clients)
            finally:
                for task in clients:
                    task.cancel()
                await asyncio.gather(*clients, return_exceptions=True)
        balancer = await asyncio.to_thread(backend_state, stack.balancer)
    return Churn(load.sent, load.failures, dict(Counter(_client_retries(logs))), balancer, steps)


async def _send(client: CriticClient, load: _Load, at_least: int) -> None:
    """One client: a request after the other until all changes are made and ``at_least`` were sent by all clients."""
    requests = lab_requests(_DIFFERENT_REQUESTS)
    while not load.finish or load.sent < at_least:
        request = requests[load.sent % len(requests)]
        load.sent += 1
        begin = time.monotonic()
        try:
            response = await client.critique(request)
        except StepalignError as error:
            load.failures.append(f"{type(error).__name__}: {error}")
            continue
        end = time.monotonic()
        load.answered.append((end - begin, end))
        if response.critique is None:
            load.failures.append(f"no critique: {response.failure}")


async def _change(stack: Stack, load: _Load, logs: _Logs, settle_seconds: float) -> list[Step]:
    async def step(change: str, work: Awaitable[list[float]] | None = None) -> Step:
        begin, before, tried = time.monotonic(), await state(), len(_client_retries(logs))
        seconds = [] if work is None else await work
        await asyncio.sleep(settle_seconds)
        after = await state()
        return Step(
            change=change,
            seconds=seconds,
            balancer_retries=after.retries - before.retries,
            balancer_redispatches=after.redispatches - before.redispatches,
            client_retries=len(_client_retries(logs)) - tried,
            slowest_request_seconds=max((took for took, end in load.answered if end > begin), default=0.0),
        )

    async def state() -> BackendState:
        return await asyncio.to_thread(backend_state, stack.balancer)

    await asyncio.sleep(settle_seconds)
    return [
        await step("no change, 1 replica"),
        await step("add 2 replicas to 1", add(stack, 3)),
        await step("no change, 3 replicas"),
        await step("drain 1 replica of 3", drain(stack, 2)),
        await step("kill 1 replica of 2", kill(stack)),
        await step("add 2 replicas to 1", add(stack, 3)),
        await step("kill 1 replica of 3", kill(stack)),
    ]


def _client_retries(logs: _Logs) -> list[str]:
    """The reason of each repetition that the SDK logged."""
    return [str(entry["error"]) for entry in logs if entry["event"].startswith("the critic gave no answer")]
