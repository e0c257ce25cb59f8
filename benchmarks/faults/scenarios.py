"""The fault matrix. After each of them every rollout must be accounted for and none trained twice.

Where nothing is skipped and no policy changed, the weights must be those of a run without a fault, bit for bit. Places
are calls inside the product; ``repetition`` moves the moment, so that many repetitions are not one repeated.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.errors import BenchError
from benchmarks.faults.flood import flood
from benchmarks.faults.injection import Action, Fault
from benchmarks.faults.processes import function
from benchmarks.faults.run import BATCH, STEPS, FaultyRun, Outcome, faulty_run
from stepalign_run.folder.layout import RunFolder
from stepalign_run.folder.ownership import OwnFolder
from stepalign_run.redis.connection import run_key

_LOOP, _LEARNER = "stepalign_trainer.loop", "stepalign_trainer.update.learner:Learner"
_SETTLEMENT, _QUEUE = (
    "stepalign_trainer.durable.settlement:Settlement",
    "stepalign_run.queue.redis_streams:RedisRolloutQueue",
)
_CRITIC = "stepalign_critic.backends.program:ProgramBackend.generate"
# Longer than the idle limit, after which a silent consumer loses its claims.
_SLOW_SECONDS = 1.5
# The most memory of Redis with the trainer away: capacity × 1.5 × payload.
_MOST_MEMORY_FACTOR = 1.5
_FLOODED_CAPACITY = 1000
_FSYNC_SECONDS = 1.0
_ATTEMPTS = 4

Faults = Callable[[int], Mapping[str, Fault]]
Disturb = Callable[[FaultyRun, random.Random], None]


class TooLateError(BenchError):
    """The run had ended before its fault came."""


@dataclass(frozen=True)
class Scenario:
    """``faults`` by process for a repetition; ``disturb`` is done from outside once the processes have started.

    ``same_weights`` says that the run's result may not show the fault. The proof that it happened
    is in the processes started again, ``restarts``, and in the outcome, which ``shows`` it.
    """

    name: str
    faults: Faults = field(default=lambda _: {})
    disturb: Disturb = field(default=lambda run, rng: None)
    same_weights: bool = True
    restarts: frozenset[str] = frozenset()
    shows: Callable[[Outcome], bool] = lambda outcome: True
    capacity: int = 2 * BATCH

    def play(self, folder: Path, repetition: int = 0) -> Outcome:
        """One repetition in a new ``folder``. A run that ended before its fault came is no repetition: another is made.

        Raises UnfinishedError when the run does not come to its end, TooLateError when the fault never comes.
        """
        for attempt in range(_ATTEMPTS - 1):
            try:
                rng = random.Random(f"{self.name} {repetition} {attempt}")
                return self.once(folder / str(attempt), repetition, rng)
            except TooLateError:
                continue
        return self.once(folder / "last", repetition, random.Random(f"{self.name} {repetition}"))

    def once(self, folder: Path, repetition: int, rng: random.Random) -> Outcome:
        began = time.monotonic()
        with faulty_run(folder, self.capacity) as run:
            run.start(faults=self.faults(repetition))
            self.disturb(run, rng)
            return run.finish(began)

    def violations(self, outcome: Outcome, undisturbed: Outcome) -> list[str]:
        """Every broken promise, in a sentence."""
        found = list(outcome.audit.problems)
        if outcome.twice:
            found.append(f"{outcome.twice} rollouts were trained twice")
        if outcome.updates != STEPS:
            found.append(f"{outcome.updates} updates instead of {STEPS}")
        if self.same_weights and outcome.weights != undisturbed.weights:
            found.append("the weights are not those of the run without a fault")
        if outcome.audit.pending:
            found.append(f"{outcome.audit.pending} rollouts are left in the queue")
        missed = {name for name in self.restarts if not outcome.restarts[name]}
        if missed:
            found.append(f"{', '.join(sorted(missed))} did not die: the fault did not happen")
        if not self.shows(outcome):
            found.append("the outcome does not show the fault: it did not happen")
        return found


def _kill(process: str, place: str, action: Action, first: int, of: int) -> Scenario:
    """A kill -9 at the ``first`` call of ``place``; repetitions go through the first ``of`` calls."""

    def faults(repetition: int) -> Mapping[str, Fault]:
        return {process: Fault(place, action, at=1 + (first - 1 + repetition) % of)}

    call = place.rpartition(":")[2].rpartition(".")[2].strip("_")
    name = f"{process} killed {action.value.partition(' ')[2]} {call}"
    return Scenario(name, faults, restarts=frozenset({process}))


def _signalled(name: str, process: str, number: int) -> Scenario:
    """A signal from outside at a moment of the run that depends on the repetition."""

    def disturb(run: FaultyRun, rng: random.Random) -> None:
        _some_way(run, rng)
        if run.commands[process].exit_code == 0:
            raise TooLateError(f"the {process} had ended before the fault")
        run.commands[process].signal(number)

    return Scenario(name, disturb=disturb, restarts=frozenset({process}))


def _some_way(run: FaultyRun, rng: random.Random) -> None:
    updates = rng.randint(0, STEPS - 2)
    run.wait(lambda: run.updates >= updates and run.published() > 0, f"update {updates}")
    time.sleep(rng.uniform(0.0, 0.2))


def _in_progress(run: FaultyRun) -> None:
    """Raises TooLateError when the run has ended: nothing done to it now is a fault any more."""
    if run.ended:
        raise TooLateError("the run had ended before the fault")


def _redis_ends(number: int) -> Disturb:
    def disturb(run: FaultyRun, rng: random.Random) -> None:
        _some_way(run, rng)
        run.redis.end(number)
        _in_progress(run)
        time.sleep(rng.uniform(0.0, 0.5))
        run.redis.start()

    return disturb


def _power_cut(run: FaultyRun, rng: random.Random) -> None:
    """Redis is killed, and a part of its writes since the last sync is lost, perhaps in the middle of a command."""
    _some_way(run, rng)
    synced = run.redis.written()
    time.sleep(rng.uniform(0.2, _FSYNC_SECONDS))
    run.redis.end(signal.SIGKILL)
    _in_progress(run)
    run.redis.cut(rng.randint(synced, run.redis.written()))
    run.redis.start()


def _poison(run: FaultyRun, rng: random.Random) -> None:
    """An entry that is no rollout, counted as published like one that a producer of ours wrote."""
    _some_way(run, rng)
    _in_progress(run)
    with run.redis.client() as client:
        client.xadd(run_key("faulty", "rollouts"), {"rollout": b'{"schema_version": 1, "rollout_id": '})
        client.hincrby(run_key("faulty", "ledger"), "published", 1)


def _outrun(run: FaultyRun, rng: random.Random) -> None:
    """A second producer offers twice the queue's capacity, first while no trainer runs, then beside one."""
    run.wait(lambda: run.published() > 0, "a first rollout")
    run.commands["trainer"].signal(signal.SIGKILL)
    trainer = run.commands.pop("trainer")
    before = run.redis.used_memory()
    run.commands["producer"] = function(run.folder, "producer", flood, str(run.config), 2 * _FLOODED_CAPACITY)
    run.wait(lambda: run.waiting() > _FLOODED_CAPACITY - BATCH, "a full queue")
    time.sleep(0.5 + rng.uniform(0.0, 0.5))
    sizes = run.payload_sizes()
    if len(sizes) > _FLOODED_CAPACITY:
        raise BenchError(f"{len(sizes)} entries in a queue of {_FLOODED_CAPACITY} whose trainer is away")
    factor = (run.redis.used_memory() - before) / sum(sizes)
    if factor > _MOST_MEMORY_FACTOR:
        raise BenchError(f"Redis holds {factor:.2f} times the payload of its full queue")
    run.commands["trainer"] = trainer
    trainer.start_again()
    run.wait(lambda: run.commands["producer"].exit_code == 0 or run.ended, "the producer's end")


def _full_disk(run: FaultyRun, rng: random.Random) -> None:
    """The checkpoints' disk takes one checkpoint and not a second one, until there is room."""
    trainer = run.commands["trainer"]
    while trainer.exit_code is None:
        time.sleep(0.02)
    if trainer.exit_code != 1 or "make room, then --resume" not in trainer.last_words():
        raise BenchError(f"the trainer did not say that the disk is full:\n{trainer.last_words()}")
    subprocess.run(["mount", "-o", "remount,size=64m", RunFolder(run.run_dir).checkpoints], check=True)
    trainer.start_again()


class FullDisk(Scenario):
    """Its checkpoints lie on a tmpfs of their own; that needs root on Linux."""

    def once(self, folder: Path, repetition: int, rng: random.Random) -> Outcome:
        began = time.monotonic()
        with faulty_run(folder) as run:
            OwnFolder(run.run_dir.parent, run.run_dir.name).claim()
            checkpoints = RunFolder(run.run_dir).checkpoints
            checkpoints.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", checkpoints], check=True)
            try:
                run.start()
                self.disturb(run, rng)
                return run.finish(began)
            finally:
                run.stop()
                subprocess.run(["umount", checkpoints], check=True)


UNDISTURBED = Scenario("no fault")
FULL_DISK = FullDisk("a full disk for the checkpoint", disturb=_full_disk, restarts=frozenset({"trainer"}))
SCENARIOS = [
    _kill("solver", f"{_QUEUE}.publish", Action.KILL_BEFORE, 3, 12),
    _kill("solver", f"{_QUEUE}.publish", Action.KILL_AFTER, 3, 12),
    _kill("solver", "stepalign_run.policy_store:RedisPolicyStore.announce_sampled", Action.KILL_BEFORE, 2, 4),
    _kill("trainer", f"{_LEARNER}.update", Action.KILL_BEFORE, 2, 4),
    _kill("trainer", f"{_LEARNER}._step", Action.KILL_AFTER, 2, 4),
    _kill("trainer", "stepalign_trainer.durable.checkpoint:_sync", Action.KILL_BEFORE, 9, 24),
    _kill("trainer", f"{_SETTLEMENT}.checkpointed", Action.KILL_BEFORE, 2, 4),
    _kill("trainer", f"{_SETTLEMENT}.checkpointed", Action.KILL_AFTER, 2, 4),
    _kill("trainer", "stepalign_run.policy_store:RedisPolicyStore.publish", Action.KILL_BEFORE, 3, 5),
    _kill("trainer", f"{_SETTLEMENT}.finish", Action.KILL_BEFORE, 1, 1),
    *(
        _signalled(f"{process} {word}", process, number)
        for number, word in ((signal.SIGKILL, "killed from outside"), (signal.SIGTERM, "told to end"))
        for process in ("solver", "trainer", "critic")
    ),
    Scenario("redis killed from outside", disturb=_redis_ends(signal.SIGKILL)),
    Scenario("redis told to end", disturb=_redis_ends(signal.SIGTERM)),
    Scenario("a power cut of redis", disturb=_power_cut),
    Scenario(
        "a slow critic",
        lambda _: {"critic": Fault(_CRITIC, Action.SLOW, seconds=_SLOW_SECONDS)},
        shows=lambda outcome: outcome.seconds > STEPS * _SLOW_SECONDS,
    ),
    Scenario(
        "a critic that answers garbage",
        lambda _: {"critic": Fault(_CRITIC, Action.GARBAGE, text="<step_1> all is well")},
        same_weights=False,
        shows=lambda outcome: sum(outcome.audit.skipped.values()) == outcome.audit.published,
    ),
    Scenario("a poison entry", disturb=_poison, shows=lambda outcome: outcome.audit.dead == 1),
    Scenario(
        "a producer that outruns the trainer",
        disturb=_outrun,
        same_weights=False,
        shows=lambda outcome: outcome.audit.published > 2 * _FLOODED_CAPACITY,
        capacity=_FLOODED_CAPACITY,
    ),
    FULL_DISK,
]
