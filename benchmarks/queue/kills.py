"""A consumer that is killed in mid-work, twenty times: what is lost, and what counts twice.

The effect is a vector with a place for each rollout, to which an update adds one where its batch stands: *lost* are
rollouts whose place is 0 in the end, *duplicated* those above 1. It is replaced whole on disk, as a checkpoint is.

Ours is the trainer's own path: the queue's claims, :class:`Settlement`, and checkpoints of that vector in an adapter's
place. The peers' pattern is a plain XREAD of pickled rollouts with the last id kept in the process. There are two ways
to begin again after a kill, at the first entry or at what comes next; a third consumer begins at the first and passes
over what its effect holds, for which it has to read the whole stream again and can never shorten it. All are fed at the
same pace, work as long on a batch, and are fed on only once they are up again.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import torch
from redis import Redis
from safetensors.torch import load_file, save_file

from benchmarks.errors import BenchError
from benchmarks.queue.payload import rollouts
from stepalign.config import QueueSection
from stepalign.ledger import OUTCOMES
from stepalign.queue import Admission, open_queue
from stepalign.queue.connection import run_key
from stepalign.types import Rollout
from stepalign_trainer.checkpoint import (
    ADAPTER,
    CHECKPOINTS,
    TrainerState,
    load_newest,
    save_checkpoint,
    write_directory,
)
from stepalign_trainer.journal import StepJournal
from stepalign_trainer.learner import Learner
from stepalign_trainer.loop import SETTLED_WINDOW
from stepalign_trainer.settlement import TRAINED, Settlement

KILLS = 20
ROLLOUTS = 400
_BATCH = 8
_WORK_SECONDS = 0.01
_PACE_SECONDS = 0.003
_LATEST_KILL_SECONDS = 0.1
_MOST_SECONDS = 120.0
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Place:
    """Where a consumer works. ``read`` counts the entries that were handed to it, over all its lives."""

    url: str
    stream: str
    folder: Path
    read: Any

    @property
    def ready(self) -> Path:
        return self.folder / "ready"


@dataclass(frozen=True)
class Contender:
    """``publisher`` gives the call that publishes one rollout over a connection that stays open."""

    consume: Callable[[Place], None]
    publisher: Callable[[str, str], Any]
    key: Callable[[str], str]
    """The stream's key in Redis."""


class _CountingLearner:
    """What checkpoints need of a learner: its weights are the effect, and a step of SGD adds to it."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.model = torch.nn.Module()
        self.counts = torch.nn.Parameter(torch.zeros(ROLLOUTS))
        self.model.register_parameter("counts", self.counts)
        self.optimizer = torch.optim.SGD([self.counts], lr=1.0)

    def save_adapter(self, directory: Path) -> None:
        save_file({"counts": self.counts.detach()}, directory / ADAPTER)

    def update(self, batch: list[Rollout]) -> None:
        gradient = torch.zeros(ROLLOUTS)
        for rollout in batch:
            gradient[_number(rollout)] -= 1.0
        self.counts.grad = gradient
        self.optimizer.step()


def _number(rollout: Rollout) -> int:
    return int(rollout.rollout_id.rpartition("/")[2])


def _effect(folder: Path) -> torch.Tensor:
    """The newest one. Zeros before the first."""
    found = sorted(folder.glob(f"{CHECKPOINTS}/step-*/{ADAPTER}"))
    return load_file(found[-1])["counts"] if found else torch.zeros(ROLLOUTS)


def _consume_ours(place: Place) -> None:
    async def work() -> None:
        queue = open_queue(QueueSection(redis_url=place.url, capacity=ROLLOUTS), place.stream, "trainer")
        await queue.start()
        counting = _CountingLearner()
        learner = cast("Learner", counting)
        settlement = Settlement(queue, StepJournal(place.folder / OUTCOMES), SETTLED_WINDOW * ROLLOUTS)
        state = load_newest(learner, place.folder, "kills") or TrainerState(0, "kills", 0, {}, 0)
        await settlement.resume(state.step, state.settled, state.settled_total)
        step = state.step
        place.ready.touch()
        while settlement.total < ROLLOUTS:
            claimed = await queue.claim(_BATCH, 0.5)
            with place.read.get_lock():
                place.read.value += len(claimed)
            fresh = await settlement.without_known(claimed)
            if not fresh:
                continue
            time.sleep(_WORK_SECONDS)
            counting.update([delivery.rollout for delivery in fresh])
            step += 1
            settlement.settle(step, fresh, [TRAINED] * len(fresh))
            state = TrainerState(step, "kills", settlement.total, settlement.settled, settlement.total)
            save_checkpoint(learner, place.folder, state)
            await settlement.checkpointed()
        await settlement.finish()

    asyncio.run(work())


def _peer(begin_at_next: bool, pass_over_known: bool) -> Callable[[Place], None]:
    def consume(place: Place) -> None:
        with Redis.from_url(place.url) as redis:
            counts, last, step = _effect(place.folder), "0", len(list(place.folder.glob(f"{CHECKPOINTS}/step-*")))
            if begin_at_next and redis.exists(place.stream):
                # What "$" stands for, before anything more is published.
                last = cast("Any", redis.xinfo_stream(place.stream))["last-generated-id"]
            place.ready.touch()
            while True:
                reply: Any = redis.xread({place.stream: last}, count=_BATCH, block=500)
                for _, entries in reply or ():
                    read = [pickle.loads(fields[b"rollout"]) for _, fields in entries]
                    with place.read.get_lock():
                        place.read.value += len(read)
                    last = entries[-1][0]
                    batch = [rollout for rollout in read if not (pass_over_known and counts[_number(rollout)])]
                    if not batch:
                        continue
                    time.sleep(_WORK_SECONDS)
                    for rollout in batch:
                        counts[_number(rollout)] += 1.0
                    step += 1
                    _write(place.folder, step, counts)

    return consume


def _write(folder: Path, step: int, counts: torch.Tensor) -> None:
    target = folder / CHECKPOINTS / f"step-{step:06d}"
    write_directory(target, lambda directory: save_file({"counts": counts}, directory / ADAPTER))


@contextmanager
def _publish_ours(url: str, run: str) -> Iterator[Callable[[Rollout], None]]:
    with asyncio.Runner() as runner:
        queue = open_queue(QueueSection(redis_url=url, capacity=ROLLOUTS), run, "solver")

        def publish(rollout: Rollout) -> None:
            if runner.run(queue.publish([rollout])) is not Admission.ADMITTED:
                raise BenchError(f"{rollout.rollout_id} was not admitted")

        yield publish
        runner.run(queue.close())


@contextmanager
def _publish_peer(url: str, stream: str) -> Iterator[Callable[[Rollout], None]]:
    with Redis.from_url(url) as redis:
        yield lambda rollout: cast("None", redis.xadd(stream, {"rollout": pickle.dumps(rollout)}))


class _Consumer:
    """A process that is killed and started again."""

    def __init__(self, contender: Contender, place: Place) -> None:
        self._contender = contender
        self._place = place
        self.start()

    def start(self) -> None:
        """And wait until it is up."""
        self._place.ready.unlink(missing_ok=True)
        self._process = _FORK.Process(target=self._contender.consume, args=(self._place,), daemon=True)
        self._process.start()
        deadline = time.monotonic() + _MOST_SECONDS
        while not self._place.ready.exists():
            if time.monotonic() > deadline or self._process.exitcode:
                raise BenchError("the consumer does not start")
            time.sleep(0.001)

    def kill(self) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()


def _play(url: str, contender: Contender, made: list[Rollout], seed: int) -> dict[str, int]:
    """Publish little by little while the consumer is killed ``KILLS`` times; then let it finish."""
    rng = random.Random(seed)
    stream = f"kills-{uuid4().hex}"
    with tempfile.TemporaryDirectory(prefix="stepalign-kills-") as name, contender.publisher(url, stream) as publish:
        place = Place(url, stream, Path(name), _FORK.Value("i", 0))
        consumer = _Consumer(contender, place)
        for number, rollout in enumerate(made, start=1):
            publish(rollout)
            time.sleep(_PACE_SECONDS)
            if number % (ROLLOUTS // KILLS) == 0:
                time.sleep(rng.uniform(0.0, _LATEST_KILL_SECONDS))
                consumer.kill()
                consumer.start()
        counts = _settled(place)
        consumer.kill()
        with Redis.from_url(url) as redis:
            left = cast("int", redis.xlen(contender.key(stream)))
        return {
            "lost": int((counts == 0).sum()),
            "duplicated": int((counts - 1).clamp(min=0).sum()),
            "entries_read": place.read.value,
            "left_in_stream": left,
        }


def _settled(place: Place) -> torch.Tensor:
    """The effect once it has not changed for two seconds. Raises BenchError when that does not come, or nothing did."""
    deadline, before, since = time.monotonic() + _MOST_SECONDS, torch.zeros(ROLLOUTS), time.monotonic()
    while time.monotonic() - since < 2.0:
        if time.monotonic() > deadline:
            raise BenchError("the consumer does not come to an end")
        found = _effect(place.folder)
        if not torch.equal(found, before):
            before, since = found, time.monotonic()
        time.sleep(0.1)
    if not before.any():
        raise BenchError("the consumer has consumed nothing")
    return before


CONTENDERS = {
    "ours": Contender(_consume_ours, _publish_ours, lambda run: run_key(run, "rollouts")),
    "peer_from_first": Contender(_peer(False, False), _publish_peer, str),
    "peer_from_next": Contender(_peer(True, False), _publish_peer, str),
    "peer_from_first_filtered": Contender(_peer(False, True), _publish_peer, str),
}


def measure_kills(url: str) -> dict[str, dict[str, int]]:
    """``lost``, ``duplicated``, ``entries_read`` and ``left_in_stream`` of ours and of the peers' ways."""
    made = rollouts(ROLLOUTS, seed=99)
    return {name: _play(url, contender, made, seed=1) for name, contender in CONTENDERS.items()}
