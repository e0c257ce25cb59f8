"""The audit of a run's rollouts: published = trained + skipped + stale + dead + pending, rollout by rollout.

Three records are compared, each written by another process: the solver's offers (``published.jsonl``), the trainer's
outcomes (``outcomes.jsonl``), and the entries and counters of the queue's server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from stepalign_run.folder.jsonl import read_rows
from stepalign_run.folder.layout import RunFolder
from stepalign_run.queue.base import SKIPPED, QueueStatus
from stepalign_run.queue.snapshot import QueueSnapshot

_SHOWN = 5


@dataclass(frozen=True)
class Records:
    """The records of solver and trainer. ``used`` counts the updates in which a rollout stands."""

    offered: frozenset[str]
    answered: frozenset[str]
    """Admitted, or refused as duplicates of an earlier offer that was admitted."""
    outcomes: dict[str, str]
    used: Counter[str]


@dataclass(frozen=True)
class Audit:
    """Numbers of rollouts. ``problems`` names every disagreement in a sentence.

    ``forgotten`` of them have an outcome and are unknown to the queue's server, whose counters lack them: a power cut
    has cost it its last writes. Solver and trainer agree on them, so they are not lost.
    """

    published: int
    trained: int
    skipped: dict[str, int]
    stale: int
    dead: int
    pending: int
    forgotten: int = 0
    problems: list[str] = field(default_factory=list[str])

    @property
    def accounted(self) -> int:
        return self.trained + sum(self.skipped.values()) + self.stale + self.dead + self.pending


def read_records(run_dir: Path) -> Records:
    """The journals of a run's folder; a last line that a kill cut short counts as not written."""
    folder = RunFolder(run_dir)
    published, outcomes = read_rows(folder.published), read_rows(folder.outcomes)
    answered = [row.get(answer, ()) for row in published for answer in ("admitted", "duplicate")]
    return Records(
        offered=frozenset(rollout_id for row in published for rollout_id in row.get("offered", ())),
        answered=frozenset(rollout_id for rollout_ids in answered for rollout_id in rollout_ids),
        outcomes={rollout_id: outcome for row in outcomes for rollout_id, outcome in row["outcomes"].items()},
        used=Counter(rollout_id for row in outcomes if row["step"] for rollout_id in row["outcomes"]),
    )


def audit(records: Records, queue: QueueSnapshot) -> Audit:
    """Compare the records with the queue. Read them first and the queue next, or a run in progress seems unbalanced.

    A rollout that an update has used and no checkpoint holds yet is pending: it is still in the queue.
    """
    # A kill may have come between admission and its row.
    published = records.answered | (records.offered & queue.admitted)
    pending, dead = frozenset(queue.pending) & published, frozenset(queue.dead) & published
    settled = {
        rollout_id: outcome
        for rollout_id, outcome in records.outcomes.items()
        if rollout_id in published and rollout_id not in pending
    }
    counts = Counter(settled[rollout_id] for rollout_id in settled if rollout_id not in dead)
    forgotten = Counter(settled[rollout_id] for rollout_id in settled.keys() - queue.admitted)
    foreign = queue.undecodable_pending + queue.undecodable_dead
    found = Audit(
        published=len(published) + foreign,
        trained=counts["trained"],
        skipped={name.removeprefix(SKIPPED): n for name, n in sorted(counts.items()) if name.startswith(SKIPPED)},
        stale=counts["stale"],
        dead=len(dead) + queue.undecodable_dead,
        pending=len(pending) + queue.undecodable_pending,
        forgotten=forgotten.total(),
    )
    lost = published - pending - dead - settled.keys()
    problems = [
        *_named("are neither in the queue nor in any outcome: they are lost", lost),
        *_named("stand in two updates: they were trained twice", (i for i, n in records.used.items() if n > 1)),
        *_named("were trained and are dead letters too", dead & settled.keys()),
        *_named("were admitted, and the solver has no record of them", queue.admitted - published),
        *_named("were never admitted and have an outcome", records.outcomes.keys() - queue.admitted - published),
        *_disagreements(found, queue.status, forgotten),
    ]
    found.problems.extend(problems)
    return found


def _disagreements(found: Audit, status: QueueStatus, forgotten: Counter[str]) -> list[str]:
    """Counters of the server that contradict the records, once the rollouts it has forgotten are taken off."""
    skips = sum(count for name, count in forgotten.items() if name.startswith(SKIPPED))
    counted = {
        "published": (found.published - forgotten.total(), status.published),
        "trained": (found.trained - forgotten["trained"], status.trained),
        "skipped": (sum(found.skipped.values()) - skips, sum(status.skipped.values())),
        "stale": (found.stale - forgotten["stale"], status.stale),
        "dead": (found.dead, status.dead),
        "pending": (found.pending, status.length),
    }
    return [
        f"{name}: {ours} by the records of solver and trainer, {theirs} by the queue"
        for name, (ours, theirs) in counted.items()
        if ours != theirs
    ]


def _named(what: str, rollout_ids: Iterable[str]) -> list[str]:
    found = sorted(rollout_ids)
    if not found:
        return []
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return [f"{len(found)} rollouts {what} ({', '.join(found[:_SHOWN])}{more})"]
