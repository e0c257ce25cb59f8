"""The report: figures of a run's files."""

from __future__ import annotations

import json
from pathlib import Path

from stepalign.problems import problems_sha256
from stepalign_report.build import build_report
from stepalign_run.config import load_config
from stepalign_run.folder.report import read_report, write_report
from stepalign_run.queue import QueueStatus

STATUS = QueueStatus(
    length=0, claimed=0, published=4, trained=3, stale=0, dead=0, skipped={"critique_truncated": 1}, dead_letters=0
)
ROW = {
    "loss": 0.5,
    "advantage_correct": 0.0,
    "advantage_correct_below": 0.0,
    "advantage_at_error": -3.0,
    "advantage_after_error": None,
}


def test_counts_are_summed_over_updates_and_the_ledger_is_reported(tmp_path: Path) -> None:
    toml = tmp_path / "run.toml"
    (tmp_path / "t.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    toml.write_text('model.path = "m"\ndata.train = "t.jsonl"\ncritic.backend = "program"\ncritic.checker = "lab"\n')
    config = load_config(toml, ["--run.dir", str(tmp_path), "--run.name", "r"], {})
    config.run_dir.mkdir()
    rows = [
        {"step": 1, "critiques": {"correct": 1, "truncated": 1}, **ROW, "alarms": []},
        {"step": 2, "critiques": {"correct": 2}, **ROW, "loss": 0.25, "alarms": ["entropy"]},
    ]
    (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = build_report(config, STATUS, wall_seconds=12.34, threads=1)
    arm = report.arms["stepalign_scoped"]
    assert report.critiques == {"correct": 3, "truncated": 1}
    assert report.rollouts.model_dump() == {
        "published": 4,
        "trained": 3,
        "skipped": {"critique_truncated": 1},
        "stale": 0,
        "dead": 0,
        "pending": 0,
    }
    assert report.model_dump()["alarms"] == {"entropy": {"first_step": 2, "updates": 1}}
    assert (arm.objective, arm.context, arm.scope) == ("forward_kl", "critique", "through_first_error")
    assert arm.first_update is not None and arm.last_update is not None
    assert (arm.first_update.loss, arm.last_update.loss) == (0.5, 0.25)
    assert report.evaluated is None and report.steps == 2 and report.wall_seconds == 12.3
    folder = config.folder
    write_report(folder, report)
    assert read_report(folder) == report
    written = json.loads(folder.report.read_text())
    assert {"base", "evaluation", "chance", "by_problem"}.isdisjoint(written)
    assert "selected_step" not in written["arms"]["stepalign_scoped"]


def test_a_report_of_a_run_on_a_folder_names_its_digest(tmp_path: Path) -> None:
    toml = tmp_path / "run.toml"
    (tmp_path / "problems").mkdir()
    (tmp_path / "problems" / "t.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    toml.write_text('model.path = "m"\ndata.train = "problems"\ncritic.backend = "program"\ncritic.checker = "lab"\n')
    config = load_config(toml, ["--run.dir", str(tmp_path), "--run.name", "r"], {})
    assert build_report(config, STATUS, 1.0, 1).terms["train"] == problems_sha256(tmp_path / "problems")
