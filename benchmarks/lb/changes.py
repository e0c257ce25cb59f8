"""Changes of the replicas, each with its clock, read while the load goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.errors import BenchError
from benchmarks.lb.haproxy import backend_state
from benchmarks.lb.stack import Container, Stack
from benchmarks.wire import fetch

_POLL_SECONDS = 0.02
_LONGEST_SECONDS = 60.0


async def add(stack: Stack, replicas: int) -> list[float]:
    """Scale up. For each new replica the seconds from its first ready answer until a critique arrived there."""
    known = {critic.id for critic in await asyncio.to_thread(stack.critics)}
    await asyncio.to_thread(stack.scale, replicas)
    critics = await asyncio.to_thread(stack.critics)
    return await asyncio.gather(*(_join(stack, critic) for critic in critics if critic.id not in known))


async def drain(stack: Stack, replicas: int) -> list[float]:
    """Scale down. The seconds that the drained replicas took to end."""
    begin = time.monotonic()
    await asyncio.to_thread(stack.scale, replicas)
    return [time.monotonic() - begin]


async def kill(stack: Stack) -> list[float]:
    """Kill a replica. The seconds from the order, given to the engine, until the balancer counts it no more."""
    up = (await asyncio.to_thread(backend_state, stack.balancer)).up
    victim = (await asyncio.to_thread(stack.critics))[-1]
    begin = time.monotonic()
    order = asyncio.create_task(asyncio.to_thread(stack.kill, victim))
    noticed = await _first(
        lambda: backend_state(stack.balancer).up < up, "the balancer did not notice a killed replica"
    )
    await order
    return [noticed - begin]


async def _join(stack: Stack, critic: Container) -> float:
    ready = partial(stack.is_ready, critic)
    # The critics take a while to load, so that nobody is ready before somebody looks.
    if await asyncio.to_thread(ready):
        raise BenchError("a new replica was ready before its first look: raise the stack's load_seconds")
    begin = await _first(ready, "a new replica did not become ready")
    return await _first(lambda: _critiques(stack, critic) > 0, "no request reached a new replica") - begin


def _critiques(stack: Stack, critic: Container) -> int:
    """Critiques that this replica has made or is making, without its refusals while it loaded."""
    answer = fetch(critic.address, "/metrics", stack.api_key)
    if answer.status != 200:
        raise BenchError(f"a critic's metrics were answered with {answer.status}: {answer.body!r}")
    counted = {"stepalign_critic_in_flight", "stepalign_critic_critiques_total"}
    families = text_string_to_metric_families(answer.body.decode())
    return sum(int(sample.value) for family in families for sample in family.samples if sample.name in counted)


async def _first(condition: Callable[[], bool], otherwise: str) -> float:
    """The time at which ``condition`` was first seen to hold. Raises BenchError when it does not come to that."""
    deadline = time.monotonic() + _LONGEST_SECONDS
    while time.monotonic() < deadline:
        if await asyncio.to_thread(condition):
            return time.monotonic()
        await asyncio.sleep(_POLL_SECONDS)
    raise BenchError(f"{otherwise} in {_LONGEST_SECONDS:g} s")
