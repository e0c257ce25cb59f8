"""The progress of a run as it is shown while the run goes on."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from stepalign_report.progress import RunProgress
from stepalign_run.config import load_config

LAB = Path(__file__).parents[3] / "configs" / "lab.toml"


def test_rows_of_another_number_of_samples_are_not_shown(tmp_path: Path) -> None:
    config = load_config(LAB, ["--run.dir", str(tmp_path), "--evaluation.samples", "3"], {})
    config.run_dir.mkdir(parents=True)
    rows = [
        {"step": 0, "split": "validation", "figures": {f"{name}_at_{k}": 50.0 for name in ("avg", "maj", "pass")}}
        for k in (2, 3)
    ]
    config.folder.evaluations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = io.StringIO()
    with RunProgress(config, Console(file=shown, width=120)) as progress:
        progress.watch()
    assert shown.getvalue().count("validation") == 1 and "Avg@3  50.00" in shown.getvalue()
