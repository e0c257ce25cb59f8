"""The run's folder: rows that another process is still writing, rows that a kill cut short, and the report's model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stepalign_run.folder.jsonl import end_at_a_whole_row, read_object, read_rows
from stepalign_run.folder.layout import RunFolder
from stepalign_run.folder.report import UnreadableReportError, read_report
from support.page_runs import write_run


def test_a_row_that_is_half_written_is_left_for_later(tmp_path: Path) -> None:
    rows = tmp_path / "metrics.jsonl"
    assert read_rows(rows) == []
    rows.write_text('{"step": 1}\n{"st')
    assert read_rows(rows) == [{"step": 1}]
    rows.write_text('{"st')
    assert read_rows(rows) == []


def test_a_line_separator_inside_a_row_ends_no_row(tmp_path: Path) -> None:
    rows = tmp_path / "tokens.jsonl"
    rows.write_text('{"token": "a\u2028b"}\n{"token": "\x85"}\n', encoding="utf-8")
    assert read_rows(rows) == [{"token": "a\u2028b"}, {"token": "\x85"}]


def test_checkpoints_are_found_by_step(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.checkpoints_by_step() == {}
    for step in (10, 9, 100):
        folder.checkpoint(step).mkdir(parents=True)
    assert list(folder.checkpoints_by_step()) == [9, 10, 100]


def test_a_row_that_a_kill_cut_short_is_removed_and_no_other(tmp_path: Path) -> None:
    rows = tmp_path / "published.jsonl"
    end_at_a_whole_row(rows)
    assert not rows.exists()
    for text, whole in (("", ""), ('{"a": 1}\n', '{"a": 1}\n'), ('{"a": 1}\n{"b', '{"a": 1}\n'), ('{"b', "")):
        rows.write_text(text)
        end_at_a_whole_row(rows)
        assert rows.read_text() == whole


def test_a_file_that_is_not_there_is_an_empty_object(tmp_path: Path) -> None:
    assert read_object(tmp_path / "evaluation.json") == {}


def test_adapters_and_checkpoints_sort_by_name_as_by_number(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.adapter(12) == tmp_path / "adapters" / "v000012"
    assert folder.checkpoint(3) == tmp_path / "checkpoints" / "step-000003"


def written(folder: Path, edit: dict[str, Any]) -> RunFolder:
    report = json.loads((write_run(folder) / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({**report, **edit}))
    return RunFolder(folder)


def test_whole_numbers_and_order_survive_a_report(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", {})
    first = read_report(folder).as_json()
    assert json.loads(first) == json.loads(folder.report.read_text())
    assert '"problems": 60,' in first and '"Avg' not in first


def test_a_key_that_no_report_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableReportError, match="novelty: Extra inputs are not permitted"):
        read_report(written(tmp_path / "run", {"novelty": 1}))


def test_half_an_evaluation_is_refused_and_the_missing_part_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableReportError, match=r"missing: by_problem\); write it again"):
        read_report(written(tmp_path / "run", {"by_problem": None}))
