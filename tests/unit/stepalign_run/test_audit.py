"""The audit: three records against each other, and the queue's part of them from a real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from redis import Redis

from stepalign_run.audit import Audit, audit, read_records
from stepalign_run.config import QueueSection
from stepalign_run.queue import open_queue
from stepalign_run.queue.base import QueueStatus
from stepalign_run.queue.snapshot import QueueSnapshot, read_snapshot
from stepalign_run.redis.connection import run_key
from stepalign_run.rollout import Rollout

# a and b were trained, c skipped, d is stale, e a dead letter; f waits, g was used by an update without a checkpoint.
LEDGER = {"published": 7, "trained": 2, "skipped:critic_error": 1, "stale": 1, "dead": 1}
OFFERED = ["a", "b", "c", "d", "e", "f", "g"]
OUTCOMES = [
    {"step": 1, "outcomes": {"a": "trained", "b": "trained", "c": "skipped:critic_error"}},
    {"step": 0, "outcomes": {"d": "stale"}},
    {"step": 2, "outcomes": {"g": "trained"}},
]


def snapshot(ledger: dict[str, int] = LEDGER, **changes: Any) -> QueueSnapshot:
    found: dict[str, Any] = {
        "admitted": frozenset(OFFERED),
        "pending": frozenset("fg"),
        "undecodable_pending": 0,
        "dead": frozenset("e"),
        "undecodable_dead": 0,
        **changes,
    }
    length = len(found["pending"]) + found["undecodable_pending"]
    status = QueueStatus.from_ledger(ledger, length=length, claimed=0, dead_letters=1)
    return QueueSnapshot(status=status, **found)


def found(
    folder: Path,
    queue: QueueSnapshot,
    outcomes: Sequence[dict[str, Any]] = OUTCOMES,
    answered: Sequence[str] = OFFERED,
    cut: str = "",
) -> Audit:
    rows = [{"offered": [name]} for name in OFFERED] + [{"admitted": [name]} for name in answered]
    (folder / "published.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + cut)
    (folder / "outcomes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in outcomes))
    return audit(read_records(folder), queue)


def test_a_run_that_adds_up(tmp_path: Path) -> None:
    report = found(tmp_path, snapshot())
    assert report == Audit(published=7, trained=2, skipped={"critic_error": 1}, stale=1, dead=1, pending=2, problems=[])
    assert report.accounted == report.published


def test_work_trained_and_forgotten_in_a_power_cut_is_told_and_not_lost(tmp_path: Path) -> None:
    """The server is as it was when b, c and d had not been published yet."""
    admitted = frozenset(OFFERED) - set("bcd")
    ledger = {"published": 4, "trained": 1, "dead": 1}
    report = found(tmp_path, snapshot(ledger, admitted=admitted))
    assert (report.problems, report.forgotten) == ([], 3)
    assert (report.published, report.trained, report.skipped, report.stale) == (7, 2, {"critic_error": 1}, 1)

    untrained = [row for row in OUTCOMES if row["step"] != 1]
    report = found(tmp_path, snapshot(ledger, admitted=admitted), outcomes=untrained)
    assert any("3 rollouts are neither in the queue nor in any outcome" in problem for problem in report.problems)
    assert report.forgotten == 1


def test_a_group_that_was_admitted_right_before_a_kill_counts(tmp_path: Path) -> None:
    assert found(tmp_path, snapshot(), answered=OFFERED[:-1], cut='{"admit').problems == []


def test_a_group_that_was_offered_and_never_admitted_does_not_count(tmp_path: Path) -> None:
    queue = snapshot(LEDGER | {"published": 6}, admitted=frozenset("abcdeg"), pending=frozenset("g"))
    report = found(tmp_path, queue, answered="abcdeg")
    assert (report.published, report.pending, report.problems) == (6, 1, [])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"queue": snapshot(pending=frozenset("g"))}, "1 rollouts are neither in the queue nor in any outcome: they"),
        ({"outcomes": [*OUTCOMES, {"step": 3, "outcomes": {"a": "trained"}}]}, "1 rollouts stand in two updates"),
        ({"queue": snapshot(dead=frozenset("ea"))}, "1 rollouts were trained and are dead letters too (a)"),
        ({"queue": snapshot(admitted=frozenset([*OFFERED, "x"]))}, "1 rollouts were admitted, and the solver has no"),
        ({"outcomes": [*OUTCOMES, {"step": 3, "outcomes": {"x": "trained"}}]}, "1 rollouts were never admitted and"),
        ({"queue": snapshot(LEDGER | {"trained": 3})}, "trained: 2 by the records of solver and trainer, 3 by the"),
        ({"queue": snapshot(LEDGER | {"published": 8})}, "published: 7 by the records of solver and trainer, 8 by"),
        ({"queue": snapshot(undecodable_pending=1)}, "published: 8 by the records of solver and trainer, 7 by"),
    ],
)
def test_what_does_not_add_up_is_said(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    report = found(tmp_path, changes.get("queue", snapshot()), changes.get("outcomes", OUTCOMES))
    assert any(said.startswith(problem) for said in report.problems), report.problems


@pytest.mark.redis
def test_a_snapshot_of_a_real_queue(redis_server: str, make_rollout: Callable[..., Rollout]) -> None:
    run = f"ledger-{uuid4().hex}"
    queue = open_queue(QueueSection(redis_url=redis_server), run, "trainer")

    async def work() -> QueueSnapshot:
        await queue.start()
        for name in "abcd":
            await queue.publish([make_rollout(rollout_id=name, group_id=name)])
        with Redis.from_url(redis_server) as redis:
            redis.xadd(run_key(run, "rollouts"), {"rollout": "no rollout"})
            redis.hincrby(run_key(run, "ledger"), "published", 1)
        first, second, *_ = await queue.claim(2, 0.0)
        await queue.acknowledge({first.entry_id: "trained"})
        await queue.dead_letter(second.entry_id, "for a test")
        await queue.close()
        return await read_snapshot(redis_server, run, 1.0)

    seen = asyncio.run(work())
    assert seen.admitted == frozenset("abcd")
    assert (seen.pending, seen.undecodable_pending) == (frozenset("cd"), 1)
    assert (seen.dead, seen.undecodable_dead) == (frozenset("b"), 0)
    assert (seen.status.published, seen.status.trained, seen.status.length, seen.status.dead) == (5, 1, 3, 1)
    assert seen.status.balanced


@pytest.mark.redis
def test_a_snapshot_of_a_run_that_nobody_has_begun(redis_server: str) -> None:
    seen = asyncio.run(read_snapshot(redis_server, f"none-{uuid4().hex}", 1.0))
    assert seen.status.published == 0 and not seen.admitted and not seen.pending
