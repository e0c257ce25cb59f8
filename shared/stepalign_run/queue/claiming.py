"""The order in which entries are claimed, and the handling of unusable ones. Shared by all queues."""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from stepalign.errors import CorruptEntryError
from stepalign_run.config import QueueSection
from stepalign_run.logging import get_logger
from stepalign_run.queue.base import Delivery
from stepalign_run.queue.codec import decode

_log = get_logger(__name__)
_LONGEST_WAIT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class RawEntry:
    """A claimed entry, not decoded yet. ``deliveries`` counts this one."""

    entry_id: str
    payload: bytes
    deliveries: int


class ClaimingQueue(ABC):
    """The claim loop over its sources. A subclass supplies the sources."""

    def __init__(self, settings: QueueSection) -> None:
        self._settings = settings
        self._held: set[str] = set()
        """Handed to the caller and not yet acknowledged; never handed out twice by this object."""

    @abstractmethod
    async def _own_pending(self, count: int) -> list[RawEntry]:
        """Entries this consumer claimed before this object was made, each once."""

    @abstractmethod
    async def _available(self, count: int) -> list[RawEntry]:
        """Entries of consumers that have been silent for ``claim_idle_seconds``, then new ones."""

    @abstractmethod
    async def _wait_for_new(self, count: int, wait_seconds: float) -> list[RawEntry]:
        """Entries that nobody was handed yet; returns as soon as there is one. The wait is over 0."""

    @abstractmethod
    async def heartbeat(self, entry_ids: Sequence[str]) -> frozenset[str]: ...

    @abstractmethod
    async def dead_letter(self, entry_id: str, reason: str) -> bool: ...

    async def claim(self, count: int, block_seconds: float) -> list[Delivery]:
        """See :meth:`stepalign_run.queue.base.RolloutQueue.claim`."""
        if count < 1 or block_seconds < 0:
            raise ValueError("claim needs a count of at least 1 and a wait that is not negative")
        deadline = time.monotonic() + block_seconds
        found: dict[str, Delivery] = {}
        for passes in itertools.count():
            buried = await self._one_pass(found, count, deadline)
            if passes:
                await self._keep(found)
            if len(found) >= count or (not buried and time.monotonic() >= deadline):
                break
        # Only now: a claim that is cancelled before hands out nothing, and its entries are reclaimed when idle.
        self._held.update(found)
        return list(found.values())

    async def _one_pass(self, found: dict[str, Delivery], count: int, deadline: float) -> int:
        """Ask the sources in order, add to ``found``, return how many entries went to the dead letters.

        Ends with the first source that gave a dead letter, which may have more to give.
        """
        for source in (self._own_pending, self._available):
            buried = await self._accept(await source(count - len(found)), found)
            if buried or len(found) >= count:
                return buried
        # In short slices, so that entries which become idle meanwhile are noticed.
        longest = min(_LONGEST_WAIT_SECONDS, self._settings.claim_idle_seconds / 3)
        wait = min(deadline - time.monotonic(), longest)
        return await self._accept(await self._wait_for_new(count - len(found), wait), found) if wait > 0 else 0

    async def _accept(self, entries: Sequence[RawEntry], found: dict[str, Delivery]) -> int:
        buried = 0
        for entry in entries:
            if entry.entry_id in self._held or entry.entry_id in found:
                continue
            if entry.deliveries > self._settings.max_deliveries:
                reason = f"delivered {entry.deliveries - 1} times without an acknowledgement"
                buried += await self._bury(entry, reason)
                continue
            try:
                rollout = decode(entry.payload)
            except CorruptEntryError as error:
                buried += await self._bury(entry, str(error))
            else:
                found[entry.entry_id] = Delivery(entry.entry_id, rollout, entry.deliveries)
        return buried

    async def _bury(self, entry: RawEntry, reason: str) -> int:
        _log.warning("dead letter", entry_id=entry.entry_id, reason=reason, deliveries=entry.deliveries)
        await self.dead_letter(entry.entry_id, reason)
        return 1

    async def _keep(self, found: dict[str, Delivery]) -> None:
        """Keep hold of entries while waiting for more; forget those that another consumer took over."""
        kept = await self.heartbeat(list(found))
        for entry_id in found.keys() - kept:
            del found[entry_id]


def report_vanished(entry_ids: Sequence[str]) -> None:
    """Log entries that were claimed and then deleted behind the queue's back. The ledger stays unbalanced by them."""
    if entry_ids:
        _log.error("claimed entries were deleted from the stream by others", entry_ids=list(entry_ids))
