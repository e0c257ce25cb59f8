"""Journals of rows by step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepalign.errors import CheckpointError
from stepalign_trainer.durable.step_journal import StepJournal


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_rows_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    journal = StepJournal(tmp_path / "run" / "metrics.jsonl")
    for step in (1, 2, 3, 4):
        journal.append({"step": step, "loss": step / 2})
    journal.resume_at(2)
    assert steps(tmp_path / "run") == [1, 2]
    journal.append({"step": 3, "loss": 0.0})
    assert steps(tmp_path / "run") == [1, 2, 3]


def test_a_torn_line_is_cut_off_even_when_it_is_whole_json(tmp_path: Path) -> None:
    journal = StepJournal(tmp_path / "metrics.jsonl")
    for torn in ('{"step": 2, "lo', '{"step": 2}'):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + torn)
        journal.resume_at(5)
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_fresh_start_empties_an_old_journal(tmp_path: Path) -> None:
    journal = StepJournal(tmp_path / "metrics.jsonl")
    journal.resume_at(0)
    assert not (tmp_path / "metrics.jsonl").exists()
    journal.append({"step": 1})
    journal.resume_at(0)
    assert steps(tmp_path) == []


def test_a_full_disk_is_a_typed_error_that_says_how_to_go_on() -> None:
    journal = StepJournal(Path("/dev/full"))
    with pytest.raises(CheckpointError, match=r"No space left on device.*--resume"):
        journal.append({"step": 1})
