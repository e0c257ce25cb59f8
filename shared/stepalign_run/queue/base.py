"""The rollout queue: the calls of producers and consumers, the same for every implementation.

At least once: an entry stays in the queue until it is acknowledged, and is delivered again when its consumer restarts
or goes silent. The ledger counts every entry exactly once, so that at each moment a reader looks

    published = trained + stale + Σ skipped + dead + length
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from stepalign_run.rollout import Rollout

SKIPPED = "skipped:"
DRAINED = "skipped:drained"
_OUTCOME = re.compile(rf"trained|stale|{SKIPPED}[\w.-]+")


class Admission(StrEnum):
    """The queue's answer to a published group."""

    ADMITTED = "admitted"
    FULL = "full"
    """The whole group does not fit now; nothing was added. Wait and publish it again."""
    DUPLICATE = "duplicate"
    """A rollout of the group was admitted before; nothing was added. A retry after a lost reply ends here."""


class Replay(StrEnum):
    """The result of putting a dead letter back into the queue."""

    REPLAYED = "replayed"
    FULL = "full"
    """The queue takes no more now; the letter stays."""
    GONE = "gone"
    """There is no such letter (any more)."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """An entry handed to a consumer. ``deliveries`` counts this one, so it is 1 at first."""

    entry_id: str
    rollout: Rollout
    deliveries: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An entry given up. ``entry_id`` is the one it had in the queue, ``payload`` its stored bytes, unchanged."""

    entry_id: str
    reason: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """Everything countable about the queue, read in one moment. All figures are numbers of entries."""

    length: int
    """Entries in the queue: claimed and waiting."""
    claimed: int
    published: int
    trained: int
    stale: int
    dead: int
    skipped: dict[str, int]
    """By reason."""
    dead_letters: int
    """Entries in the dead-letter stream now; ``dead`` counts those that ever went there."""

    @property
    def waiting(self) -> int:
        return self.length - self.claimed

    @property
    def balanced(self) -> bool:
        """False when entries came or went behind the queue's back, for instance by XDEL or XTRIM."""
        accounted = self.trained + self.stale + sum(self.skipped.values()) + self.dead + self.length
        return self.published == accounted

    @classmethod
    def from_ledger(cls, ledger: Mapping[str, int], *, length: int, claimed: int, dead_letters: int) -> QueueStatus:
        return cls(
            length=length,
            claimed=claimed,
            published=ledger.get("published", 0),
            trained=ledger.get("trained", 0),
            stale=ledger.get("stale", 0),
            dead=ledger.get("dead", 0),
            skipped={name.removeprefix(SKIPPED): n for name, n in ledger.items() if name.startswith(SKIPPED)},
            dead_letters=dead_letters,
        )


def check_outcomes(outcomes: Iterable[str]) -> None:
    """Raise ValueError for an outcome that has no place in the ledger."""
    for outcome in outcomes:
        if not _OUTCOME.fullmatch(outcome):
            raise ValueError(f"outcome {outcome!r} is none of 'trained', 'stale' and 'skipped:<reason>'")


class RolloutQueue(Protocol):
    """The queue of one run, seen by one process.

    Every method raises QueueUnavailableError when the server cannot be reached, after retries of some seconds.
    """

    async def start(self) -> None:
        """Connect, check the server, create the consumer group at the very first entry.

        Raises UnsupportedServerError for a server older than Redis 7.0 or one that may evict keys.
        """
        ...

    async def close(self) -> None:
        """Disconnect. Claimed entries stay this consumer's."""
        ...

    async def publish(self, group: Sequence[Rollout]) -> Admission:
        """Admit a whole group or refuse it.

        Raises ValueError for a group that could never be admitted: empty, of mixed ``group_id``, with a repeated
        ``rollout_id``, larger than the capacity, or with an entry over ``max_entry_bytes``.
        """
        ...

    async def claim(self, count: int, block_seconds: float) -> list[Delivery]:
        """Take up to ``count`` entries; fewer, perhaps none, once ``block_seconds`` have passed.

        Entries come in this order: those this consumer had claimed before it restarted, those that silent consumers
        left, new ones. This object hands out no entry twice. An entry that does not decode, or that has been
        delivered more than ``max_deliveries`` times, goes to the dead letters instead.
        """
        ...

    async def heartbeat(self, entry_ids: Sequence[str]) -> frozenset[str]:
        """Give a sign of life for claimed entries. Returns those that are still this consumer's.

        To be called well before ``claim_idle_seconds`` have passed. It counts as no delivery.
        """
        ...

    async def acknowledge(self, outcomes: Mapping[str, str]) -> int:
        """Remove entries for good. Maps entry id to ``trained``, ``stale`` or ``skipped:<reason>``.

        Returns how many were counted: an entry that was acknowledged before is not counted twice.
        """
        ...

    async def dead_letter(self, entry_id: str, reason: str) -> bool:
        """Move an entry to the dead letters. False when it is not in the queue any more."""
        ...

    async def status(self) -> QueueStatus:
        """Read all counts in one moment. Needs no :meth:`start`."""
        ...

    async def dead_letters(self, count: int) -> list[DeadLetter]:
        """The oldest ``count`` dead letters. Needs no :meth:`start`."""
        ...

    async def replay(self, entry_id: str) -> Replay:
        """Put a dead letter back into the queue, under a new entry id and with no delivery counted. Needs no start."""
        ...

    async def entries(self) -> dict[str, bytes]:
        """Everything in the queue, claimed or waiting, by entry id and oldest first. Needs no :meth:`start`."""
        ...
