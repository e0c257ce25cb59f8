"""The progress of a run as it is shown while the run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepalign.commands.terminal import Terminal
from stepalign_report.progress import RunProgress
from stepalign_run.config import Config, load_config

LAB = Path(__file__).parents[3] / "configs" / "lab.toml"


def watched(config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What one look at the run's rows prints."""
    monkeypatch.setenv("COLUMNS", "120")
    with RunProgress(config, Terminal()) as progress:
        progress.watch()
    return capsys.readouterr().out


def test_rows_of_another_number_of_samples_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(LAB, ["--run.dir", str(tmp_path), "--evaluation.samples", "3"], {})
    config.run_dir.mkdir(parents=True)
    rows = [
        {"step": 0, "split": "validation", "figures": {f"{name}_at_{k}": 50.0 for name in ("avg", "maj", "pass")}}
        for k in (2, 3)
    ]
    config.folder.evaluations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = watched(config, monkeypatch, capsys)
    assert shown.count("validation") == 1 and "Avg@3  50.00" in shown


def test_no_row_steers_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(LAB, ["--run.dir", str(tmp_path)], {})
    config.run_dir.mkdir(parents=True)
    figures = {f"{name}_at_{config.evaluation.samples}": 50.0 for name in ("avg", "maj", "pass")}
    row = {"step": 0, "split": "a\x1b[31mb\u202ec[/bold]", "figures": figures}
    config.folder.evaluations.write_text(json.dumps(row) + "\n")
    shown = watched(config, monkeypatch, capsys)
    assert "a\ufffd[31mb\ufffdc[/bold] · step" in shown
    assert set("\x1b\u202e") & set(shown) == set()


def test_a_line_about_an_update_says_what_became_of_its_critiques(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else `0 of 8 rollouts trained` leaves open why."""
    config = load_config(LAB, ["--run.dir", str(tmp_path)], {})
    config.run_dir.mkdir(parents=True)
    row = {"step": config.trainer.steps, "loss": 0.0, "trained_rollouts": 0, "rollouts": 8}
    figures = dict.fromkeys(("entropy", "mean_tokens", "advantage_correct", "advantage_at_error"))
    critiques = {"critic_error": 7, "no_error_found": 1}
    config.folder.metrics.write_text(json.dumps({**row, **figures, "critiques": critiques}) + "\n")
    shown = watched(config, monkeypatch, capsys)
    assert "0 of 8 rollouts trained · critiques: critic_error 7, no_error_found 1\n" in shown
