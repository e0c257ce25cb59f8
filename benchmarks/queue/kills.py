"""A consumer that is killed in mid-work, twenty times: what is lost, and what counts twice.

*Lost*: rollouts that were published and are in no effect in the end. *Duplicated*: rollouts that are in the effect more
than once. The effect is a file that is replaced whole, as a checkpoint is.

Ours claims, writes its effect with the ids that are in it, then acknowledges. The peers' pattern is a plain XREAD of
pickled rollouts with the last id kept in the process; there are two ways to begin again after a kill, at the first
entry or at what comes next, and both are measured.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import pickle
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from redis import Redis

from benchmarks.errors import BenchError
from benchmarks.queue.payload import rollouts
from stepalign.config import QueueSection
from stepalign.queue import open_queue
from stepalign.types import Rollout

KILLS = 20
ROLLOUTS = 400
_BATCH = 8
_WORK_SECONDS = 0.01
_MOST_SECONDS = 120.0
_FORK = multiprocessing.get_context("fork")


def _effect(folder: Path) -> list[str]:
    path = folder / "effect.json"
    return json.loads(path.read_text()) if path.exists() else []


def _write(folder: Path, names: list[str]) -> None:
    scratch = folder / "effect.tmp"
    with scratch.open("w") as file:
        json.dump(names, file)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(folder / "effect.json")


def _consume_ours(url: str, run: str, folder: Path) -> None:
    async def work() -> None:
        queue = open_queue(QueueSection(redis_url=url, capacity=ROLLOUTS, max_deliveries=2 * KILLS), run, "trainer")
        await queue.start()
        names = _effect(folder)
        while True:
            claimed = await queue.claim(_BATCH, 0.5)
            fresh = [each.rollout.rollout_id for each in claimed if each.rollout.rollout_id not in names]
            time.sleep(_WORK_SECONDS)
            names += fresh
            _write(folder, names)
            await queue.acknowledge({each.entry_id: "trained" for each in claimed})

    asyncio.run(work())


def _consume_peer(url: str, stream: str, folder: Path, begin: str) -> None:
    with Redis.from_url(url) as redis:
        names, last = _effect(folder), begin
        while True:
            reply: Any = redis.xread({stream: last}, count=_BATCH, block=500)
            for _, entries in reply or ():
                read = [pickle.loads(fields[b"rollout"]) for _, fields in entries]
                time.sleep(_WORK_SECONDS)
                names += [rollout.rollout_id for rollout in read]
                _write(folder, names)
                last = entries[-1][0]


def _publish_ours(url: str, run: str, made: list[Rollout]) -> Callable[[int], None]:
    def publish(number: int) -> None:
        async def work() -> None:
            queue = open_queue(QueueSection(redis_url=url, capacity=ROLLOUTS), run, "solver")
            await queue.publish([made[number]])
            await queue.close()

        asyncio.run(work())

    return publish


def _publish_peer(url: str, stream: str, made: list[Rollout]) -> Callable[[int], None]:
    redis = Redis.from_url(url)

    def publish(number: int) -> None:
        redis.xadd(stream, {"rollout": pickle.dumps(made[number])})

    return publish


def _play(publish: Callable[[int], None], consume: Callable[..., None], arguments: tuple[Any, ...], seed: int) -> Any:
    """Publish little by little while the consumer is killed ``KILLS`` times; then let it finish."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="stepalign-kills-") as name:
        folder = Path(name)
        process = _FORK.Process(target=consume, args=(*arguments[:2], folder, *arguments[2:]), daemon=True)
        process.start()
        for number in range(ROLLOUTS):
            publish(number)
            if number % (ROLLOUTS // KILLS) == ROLLOUTS // KILLS - 1:
                time.sleep(rng.uniform(0.0, 0.1))
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                process = _FORK.Process(target=consume, args=(*arguments[:2], folder, *arguments[2:]), daemon=True)
                process.start()
        _settle(folder)
        process.kill()
        process.join()
        counts = Counter(_effect(folder))
    if not counts:
        raise BenchError("the consumer has consumed nothing")
    return {"lost": ROLLOUTS - len(counts), "duplicated": sum(count - 1 for count in counts.values())}


def _settle(folder: Path) -> None:
    """Wait until the effect has not changed for two seconds."""
    deadline, before, since = time.monotonic() + _MOST_SECONDS, -1, time.monotonic()
    while time.monotonic() - since < 2.0:
        if time.monotonic() > deadline:
            raise BenchError("the consumer does not come to an end")
        found = len(_effect(folder))
        if found != before:
            before, since = found, time.monotonic()
        time.sleep(0.1)


def measure_kills(url: str) -> dict[str, dict[str, int]]:
    """``lost`` and ``duplicated`` of ours and of the peers' pattern, begun again at either end."""
    made = rollouts(ROLLOUTS, seed=99)
    run = f"kills-{uuid4().hex}"
    first, following = f"peer-{uuid4().hex}", f"peer-{uuid4().hex}"
    return {
        "ours": _play(_publish_ours(url, run, made), _consume_ours, (url, run), 1),
        "peer_from_first": _play(_publish_peer(url, first, made), _consume_peer, (url, first, "0"), 1),
        "peer_from_next": _play(_publish_peer(url, following, made), _consume_peer, (url, following, "$"), 1),
    }
