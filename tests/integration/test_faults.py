"""The fault matrix, once each: real processes, a real Redis, kills. ``make bench-faults`` repeats it twenty times."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults.run import BATCH, STEPS, Outcome, faulty_run
from benchmarks.faults.scenarios import FULL_DISK, SCENARIOS, UNDISTURBED, Scenario

pytestmark = [pytest.mark.slow, pytest.mark.redis]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return UNDISTURBED.play(tmp_path_factory.mktemp("undisturbed") / "run")


def test_a_run_without_a_fault_trains_every_rollout_once(undisturbed: Outcome) -> None:
    assert UNDISTURBED.violations(undisturbed, undisturbed) == []
    assert undisturbed.audit.trained == undisturbed.audit.published == STEPS * BATCH
    assert set(undisturbed.restarts.values()) == {0}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_nothing_is_lost_and_nothing_trained_twice(scenario: Scenario, undisturbed: Outcome, tmp_path: Path) -> None:
    if scenario is FULL_DISK and (platform.system() != "Linux" or os.getuid() != 0):
        pytest.skip("a disk of its own needs root on Linux")
    outcome = scenario.play(tmp_path / "run")
    assert scenario.violations(outcome, undisturbed) == []
    assert outcome.audit.published == outcome.audit.accounted >= STEPS * BATCH


def test_the_audit_finds_what_was_lost_and_what_was_trained_twice(tmp_path: Path) -> None:
    with faulty_run(tmp_path / "run") as run:
        run.start()
        run.finish(0.0)

        def audit() -> tuple[int, str]:
            command = [sys.executable, "-m", "stepalign.cli", "run", "audit", str(run.run_dir), str(run.config)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            return done.returncode, " ".join(done.stdout.split())

        assert audit() == (0, audit()[1]) and "it adds up" in audit()[1]
        outcomes = run.run_dir / "outcomes.jsonl"
        rows = [json.loads(line) for line in outcomes.read_text().splitlines()]
        lost, again = sorted(rows[0]["outcomes"])[0], sorted(rows[1]["outcomes"])[0]
        del rows[0]["outcomes"][lost]
        rows[2]["outcomes"][again] = "trained"
        outcomes.write_text("".join(json.dumps(row) + "\n" for row in rows))
        code, said = audit()
    assert code == 1
    assert f"1 rollouts are neither in the queue nor in any outcome: they are lost ({lost})" in said
    assert f"1 rollouts stand in two updates: they were trained twice ({again})" in said
    assert "trained: 15 by the records of solver and trainer, 16 by the queue" in said
