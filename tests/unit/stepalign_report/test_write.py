"""The files that finished runs leave beside their reports."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from stepalign.errors import ConfigError
from stepalign_report.write import compare_into, ensure_page
from stepalign_run.folder.layout import RunFolder
from stepalign_run.folder.ownership import NotOursError
from support.page_runs import write_run


def test_a_comparison_is_written_with_a_page_of_all_runs_and_one_of_each(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / arm, arm) for arm in ("grpo", "stepalign_scoped")]
    comparison = compare_into(RunFolder(tmp_path), folders)
    assert [arm.name for arm in comparison.arms] == ["stepalign_scoped", "grpo"]
    assert json.loads((tmp_path / "comparison.json").read_text()) == json.loads(json.dumps(comparison.as_json()))
    page = (tmp_path / "report.html").read_text()
    assert page.index("stepalign_scoped-0") < page.index("grpo-0")
    assert all((folder / "report.html").stat().st_size > 10_000 for folder in folders)


def test_runs_that_cannot_be_compared_leave_no_file(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    with pytest.raises(ConfigError, match="leave one of them out"):
        compare_into(RunFolder(tmp_path), [folder, folder])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_page_is_written_where_there_is_none_or_an_older_one(tmp_path: Path) -> None:
    folder = RunFolder(write_run(tmp_path / "a"))
    ensure_page(folder)
    whole = folder.page.read_text()
    newer = f"{whole}newer"
    folder.page.write_text(newer)
    ensure_page(folder)
    assert folder.page.read_text() == newer
    os.utime(folder.page, (1.0, 1.0))
    ensure_page(folder)
    assert folder.page.read_text() == whole


def test_a_page_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    folder = RunFolder(write_run(tmp_path / "a"))
    folder.page.write_text("<h1>mine</h1>")
    os.utime(folder.page, (1.0, 1.0))
    with pytest.raises(NotOursError, match=r"report\.html is there already and was not made by stepalign"):
        ensure_page(folder)
    assert folder.page.read_text() == "<h1>mine</h1>"
