"""How the report of a probe is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from stepalign.commands.application import build_app
from stepalign.errors import ConfigError
from stepalign_report.probe_tables import probe_tables, recommendation, remarks
from stepalign_run.config import load_config
from stepalign_run.probing import ProbePlan, ProbeReport
from support.probes import arm, probe_report_of

LAB = Path(__file__).parents[3] / "configs" / "lab.toml"


@pytest.fixture
def report(tmp_path: Path) -> ProbeReport:
    plan = ProbePlan(samples=2, arms={"stepalign": load_config(LAB, ["--run.arm", "stepalign"]).arm})
    return probe_report_of(load_config(LAB, ["--run.dir", str(tmp_path / "runs")]), plan)


def text_of(*tables: Any) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    return capture.get()


def test_the_tables_fit_80_columns_and_show_contexts_arms_and_critiques(report: ProbeReport) -> None:
    shown = text_of(*probe_tables(report))
    assert "…" not in shown
    contexts, rest = shown.split("arms, best score first")
    arms, critiques = rest.split("critiques of 4 rollouts")
    row = next(line for line in contexts.splitlines() if line.startswith("critique "))
    assert row.split() == ["critique", "75", "(62–88)", "50.0", "0.25", "0.00", "0.0", "-14.25", "-1.50"]
    rows = [line.split() for line in arms.splitlines()]
    assert ["1", "stepalign_scoped", "critique,", "to", "first", "error", "0.900", "0.900", "(0.850–0.950)"] in rows
    assert ["–", "fixed_negative", "fixed_negative", "–", "–"] in rows
    assert ["refused:", "truncated", "1", "25.0"] in [line.split() for line in critiques.splitlines()]


def test_remarks_name_what_was_left_out_and_end_with_the_recommendation(report: ProbeReport) -> None:
    notes = remarks(report)
    assert notes[0] == "fixed_negative: no prediction"
    assert notes[1] == "critique: 3 of 4 rollouts; left out: critique_truncated 1"
    assert notes[-1].startswith("worth running first: stepalign_scoped. Caveat: a probe sees the base model")
    unlocated = remarks(report.model_copy(update={"unlocated": 2}))
    assert any(note.startswith("of 2 rollouts it is not known where they err") for note in unlocated)
    unusable = remarks(report.model_copy(update={"unusable": {"unknown_tokens": 2, "critique_is_of_another_text": 1}}))
    said = "3 rollouts cannot be used and are in no figure: unknown_tokens 2, critique_is_of_another_text 1"
    assert said in unusable


def test_arms_whose_intervals_overlap_are_not_told_apart() -> None:
    close = recommendation([arm("a", 0.5, 0.1), arm("b", 0.375, 0.05), arm("c", 0.3, 0.05), arm("d", None)])
    assert close.startswith("worth running first: a (not told apart from it: b). Caveat:")
    assert recommendation([arm("a", 0.0), arm("b", None)]) == "no arm can be recommended: none has a score above 0"


def test_the_command_prints_the_tables_or_the_report_itself(tmp_path: Path, report: ProbeReport) -> None:
    (tmp_path / "probe.json").write_text(report.model_dump_json())
    shown = CliRunner().invoke(build_app(), ["probe-report", str(tmp_path)], catch_exceptions=False)
    assert shown.exit_code == 0 and "worth running first: stepalign_scoped" in shown.stdout
    told = CliRunner().invoke(build_app(), ["probe-report", str(tmp_path), "--json"], catch_exceptions=False)
    assert ProbeReport.model_validate_json(told.stdout) == report


@pytest.mark.parametrize("content", [b"{}", b"[", b"\xff"])
def test_a_broken_probe_is_refused_without_a_link_to_a_librarys_documentation(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "probe.json").write_bytes(content)
    with pytest.raises(ConfigError, match="run `stepalign probe` again") as refused:
        CliRunner().invoke(build_app(), ["probe-report", str(tmp_path)], catch_exceptions=False)
    assert "://" not in str(refused.value)


def test_a_folder_without_a_probe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `stepalign probe` again"):
        CliRunner().invoke(build_app(), ["probe-report", str(tmp_path)], catch_exceptions=False)
