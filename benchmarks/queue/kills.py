"""A consumer that is killed in mid-work, twenty times: rollouts lost, and rollouts counted twice.

The effect is a vector with a place for each rollout, to which an update adds one where its batch stands: *lost* are
rollouts whose place is 0 in the end, *duplicated* those above 1. It is replaced whole on disk, as a checkpoint is.

Ours is the trainer's own path: the queue's claims, :class:`Settlement`, and checkpoints of that vector in an adapter's
place. The peers' pattern is a plain XREAD of pickled rollouts with the last id kept in the process. There are two ways
to begin again after a kill, at the first entry or at the next new one. A third peer begins at the first and passes over
rollouts that its effect holds: nothing is lost or counted twice then either, but every restart reads the whole stream
again, and none of it may ever be trimmed. *Reread* are the times that an entry was handed to a consumer beyond its
first, and *left in stream* are the entries that the server still holds in the end.

All take at most as many entries at once, work as long on a batch, and are fed at the same pace over a connection that
stays open. Kills come at random moments of the feeding, the same for all, but only while the consumer works on a batch:
one that finds it idle is put off to the next entry. Feeding goes on once the consumer is up again.
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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
from stepalign_run.config import QueueSection
from stepalign_run.folder.layout import ADAPTER_FILE, RunFolder
from stepalign_run.queue import Admission, Delivery, open_queue
from stepalign_run.redis.connection import run_key
from stepalign_run.rollout import Rollout
from stepalign_trainer.batch.item import TRAINED
from stepalign_trainer.durable.checkpoint import (
    TrainerState,
    check_checkpoint,
    checkpoints,
    load_newest,
    save_checkpoint,
    write_directory,
)
from stepalign_trainer.durable.settlement import Settlement
from stepalign_trainer.durable.step_journal import StepJournal
from stepalign_trainer.loop import SETTLED_WINDOW
from stepalign_trainer.update.learner import Learner

KILLS = 20
ROLLOUTS = 400
_BATCH = 8
_WORK_SECONDS = 0.01
_PACE_SECONDS = 0.005
_BLOCK_SECONDS = 0.5
_MOST_SECONDS = 120.0
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Place:
    """The place of a consumer's work, and its notes on itself in memory that outlives it.

    Without locks: a consumer that is killed while it holds one would stop all that follow.
    """

    url: str
    stream: str
    folder: Path
    reads: Any
    """How often each rollout was handed to a consumer."""
    busy: Any
    """Whether it works on a batch: from when it has one until the effect holds it and, if ours, that is settled."""

    @property
    def ready(self) -> Path:
        return self.folder / "ready"

    def note(self, batch: Sequence[Rollout]) -> None:
        """Count another delivery of each rollout."""
        for rollout in batch:
            self.reads[_number(rollout)] += 1

    @contextmanager
    def work(self) -> Iterator[None]:
        """Enclose a consumer's work on a batch. The update itself takes as long for all."""
        self.busy.value = 1
        time.sleep(_WORK_SECONDS)
        yield
        self.busy.value = 0


@dataclass(frozen=True)
class Contender:
    """``publisher`` gives the call that publishes one rollout over a connection that stays open."""

    consume: Callable[[Place], None]
    publisher: Callable[[str, str], Any]
    key: Callable[[str], str]
    """The stream's key in Redis."""


class _CountingLearner:
    """The learner as checkpoints need it: its weights are the effect, and a step of SGD adds to it."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.model = torch.nn.Module()
        self.counts = torch.nn.Parameter(torch.zeros(ROLLOUTS))
        self.model.register_parameter("counts", self.counts)
        self.optimizer = torch.optim.SGD([self.counts], lr=1.0)

    def save_adapter(self, directory: Path) -> None:
        save_file({"counts": self.counts.detach()}, directory / ADAPTER_FILE)

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
    found = sorted(RunFolder(folder).checkpoints.glob(f"step-*/{ADAPTER_FILE}"))
    return load_file(found[-1])["counts"] if found else torch.zeros(ROLLOUTS)


def _consume_ours(place: Place) -> None:
    async def work() -> None:
        queue = open_queue(QueueSection(redis_url=place.url, capacity=ROLLOUTS), place.stream, "trainer")
        await queue.start()
        counting = _CountingLearner()
        learner = cast("Learner", counting)
        settlement = Settlement(queue, StepJournal(RunFolder(place.folder).outcomes), SETTLED_WINDOW * ROLLOUTS)
        state = load_newest(learner, place.folder, "kills") or TrainerState(0, "kills", {}, 0)
        await settlement.resume(state.step, state.settled, state.settled_total)
        step = state.step

        async def claim() -> list[Delivery]:
            claimed = await queue.claim(_BATCH, _BLOCK_SECONDS)
            place.note([delivery.rollout for delivery in claimed])
            return await settlement.without_known(claimed)

        place.ready.touch()
        while settlement.total < ROLLOUTS:
            fresh = await claim()
            if not fresh:
                continue
            with place.work():
                counting.update([delivery.rollout for delivery in fresh])
                step += 1
                settlement.settle(step, [(delivery, TRAINED) for delivery in fresh])
                state = TrainerState(step, "kills", settlement.settled, settlement.total)
                save_checkpoint(learner, place.folder, state)
                await settlement.checkpointed()
        check_checkpoint(checkpoints(place.folder)[-1])
        await settlement.finish()
        while (await queue.status()).length:
            await settlement.stale(await claim())

    asyncio.run(work())


def _peer(begin_at_next: bool, pass_over_known: bool) -> Callable[[Place], None]:
    def consume(place: Place) -> None:
        with Redis.from_url(place.url) as redis:
            counts, last, step = (
                _effect(place.folder),
                "0",
                len(RunFolder(place.folder).checkpoints_by_step()),
            )
            if begin_at_next and redis.exists(place.stream):
                # Resolve "$" before anything more is published.
                last = cast("Any", redis.xinfo_stream(place.stream))["last-generated-id"]
            place.ready.touch()
            while True:
                reply: Any = redis.xread({place.stream: last}, count=_BATCH, block=round(_BLOCK_SECONDS * 1000))
                for _, entries in reply or ():
                    read = [pickle.loads(fields[b"rollout"]) for _, fields in entries]
                    place.note(read)
                    last = entries[-1][0]
                    batch = [rollout for rollout in read if not (pass_over_known and counts[_number(rollout)])]
                    if not batch:
                        continue
                    with place.work():
                        for rollout in batch:
                            counts[_number(rollout)] += 1.0
                        step += 1
                        _write(place.folder, step, counts)

    return consume


def _write(folder: Path, step: int, counts: torch.Tensor) -> None:
    target = RunFolder(folder).checkpoint(step)
    write_directory(target, lambda directory: save_file({"counts": counts}, directory / ADAPTER_FILE))


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
        self._place.busy.value = 0
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
    """Publish at a fixed pace while the consumer is killed ``KILLS`` times; then let it finish.

    Raises BenchError when it was not at work often enough for so many kills.
    """
    rng = random.Random(seed)
    due = _kills_due(rng)
    stream = f"kills-{uuid4().hex}"
    with tempfile.TemporaryDirectory(prefix="stepalign-kills-") as name, contender.publisher(url, stream) as publish:
        place = Place(url, stream, Path(name), _FORK.RawArray("i", ROLLOUTS), _FORK.RawValue("b", 0))
        consumer = _Consumer(contender, place)
        for number, rollout in enumerate(made, start=1):
            begin = time.monotonic()
            publish(rollout)
            _sleep_until(begin + rng.uniform(0.0, _PACE_SECONDS))
            if due and number >= due[0] and place.busy.value:
                due.popleft()
                consumer.kill()
                consumer.start()
            _sleep_until(begin + _PACE_SECONDS)
        if due:
            raise BenchError(f"{len(due)} of {KILLS} kills never found the consumer at work")
        counts = _settled(place)
        consumer.kill()
        with Redis.from_url(url) as redis:
            left = cast("int", redis.xlen(contender.key(stream)))
        return {
            "lost": int((counts == 0).sum()),
            "duplicated": int((counts - 1).clamp(min=0).sum()),
            "reread": sum(max(0, reads - 1) for reads in place.reads),
            "left_in_stream": left,
        }


def _kills_due(rng: random.Random) -> deque[int]:
    """How many rollouts are to be published before each: one at random in every stretch but the last."""
    stretch = ROLLOUTS // (KILLS + 1)
    return deque(number * stretch + rng.randint(1, stretch) for number in range(KILLS))


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


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
    """``lost``, ``duplicated``, ``reread`` and ``left_in_stream`` of ours and of the peers' ways."""
    made = rollouts(ROLLOUTS, seed=99)
    return {name: _play(url, contender, made, seed=1) for name, contender in CONTENDERS.items()}
