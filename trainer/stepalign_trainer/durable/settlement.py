"""The outcomes of rollouts, and the moment when the queue may forget them.

An entry is acknowledged once two checkpoints hold it, so that the older one can take over from a newer one that a power
cut or a bad disk has spoilt: the rollouts of the updates between them are still in the queue then, and the same updates
are made again. Two exceptions: a checkpoint that was read back after a restart answers for its rollouts alone, and so
does the last one of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from stepalign.errors import CheckpointError
from stepalign_run.queue import Delivery, QueueStatus, RolloutQueue
from stepalign_trainer.durable.step_journal import StepJournal

STALE = "stale"


class Settled(NamedTuple):
    """A rollout's entry in the queue, and its outcome."""

    entry_id: str
    outcome: str


class Settlement:
    """The outcomes of a run's rollouts. ``window`` is how many of the newest a checkpoint holds."""

    def __init__(self, queue: RolloutQueue, journal: StepJournal, window: int) -> None:
        self._queue = queue
        self._journal = journal
        self._window = window
        self.settled: dict[str, Settled] = {}
        """By rollout id, the newest last."""
        self.total = 0
        """Rollouts that updates have used or skipped since the run began."""
        self._since_checkpoint: dict[str, str] = {}
        self._in_newest: dict[str, str] = {}

    async def resume(self, step: int, settled: Mapping[str, Settled], total: int) -> None:
        """Take over the contents of the checkpoint of ``step``, 0 for none.

        Raises CheckpointError when the queue has let go of more: those rollouts would never come again.
        """
        status = await self._queue.status()
        gone = acknowledged(status) - total
        if gone > 0:
            raise CheckpointError(
                f"the newest whole checkpoint is that of step {step}, but {gone} rollouts of later updates have left "
                "the queue: they were in a checkpoint that is missing or broken, or the queue was drained. Put the "
                "checkpoint back, or start again with --overwrite"
            )
        self.settled, self.total = dict(settled), total
        self._journal.resume_at(step)

    async def without_known(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """The deliveries without those that the checkpoint holds, which are acknowledged."""
        known = {
            delivery.entry_id: self.settled[delivery.rollout.rollout_id].outcome
            for delivery in deliveries
            if delivery.rollout.rollout_id in self.settled
        }
        await self._acknowledge(known)
        return [delivery for delivery in deliveries if delivery.entry_id not in known]

    async def stale(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge rollouts that no update will use."""
        if deliveries:
            self._journal.append({"step": 0, "outcomes": {each.rollout.rollout_id: STALE for each in deliveries}})
            await self._acknowledge({delivery.entry_id: STALE for delivery in deliveries})

    def settle(self, step: int, pairs: Sequence[tuple[Delivery, str]]) -> None:
        """Note the rollouts of update ``step`` and their outcomes. The next checkpoint has to hold it."""
        self._journal.append({"step": step, "outcomes": {each.rollout.rollout_id: outcome for each, outcome in pairs}})
        self.settled |= {each.rollout.rollout_id: Settled(each.entry_id, outcome) for each, outcome in pairs}
        self.settled = dict(islice(self.settled.items(), max(0, len(self.settled) - self._window), None))
        self.total += len(pairs)
        self._since_checkpoint |= {each.entry_id: outcome for each, outcome in pairs}

    async def checkpointed(self) -> None:
        """A checkpoint is durable: acknowledge the contents of the one before it."""
        await self._acknowledge(self._in_newest)
        self._in_newest, self._since_checkpoint = self._since_checkpoint, {}

    async def finish(self) -> None:
        """The run's last checkpoint is durable and was read back: no other will follow it."""
        await self._acknowledge(self._in_newest)
        self._in_newest = {}

    @property
    def held(self) -> list[str]:
        """Entries that are settled and not acknowledged yet."""
        return [*self._in_newest, *self._since_checkpoint]

    async def _acknowledge(self, outcomes: Mapping[str, str]) -> None:
        if outcomes:
            await self._queue.acknowledge(outcomes)


def acknowledged(status: QueueStatus) -> int:
    """Rollouts that left the queue because an update had used or skipped them."""
    return status.trained + sum(status.skipped.values())
