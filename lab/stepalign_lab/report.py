"""``report.json``: what a run did, from the files that its processes wrote.

But for ``wall_seconds`` it is the same for the same seed, configuration, machine and thread count.
"""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stepalign.config import Config
from stepalign.queue import QueueStatus

PACKAGES = ("stepalign", "torch", "transformers", "peft", "redis")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Whole rows of a JSON Lines file that another process may be writing; none when it is not there yet."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def sum_counts(rows: list[dict[str, Any]], key: str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row[key])
    return dict(sorted(total.items()))


def build_report(config: Config, status: QueueStatus, wall_seconds: float, threads: int) -> dict[str, Any]:
    """Assemble the report of a finished run. Evaluation figures are there when the run had evaluation problems."""
    rows = read_rows(config.run_dir / "metrics.jsonl")
    arm: dict[str, Any] = {
        "first_update": _advantages(rows[0]) if rows else None,
        "last_update": _advantages(rows[-1]) if rows else None,
    }
    report: dict[str, Any] = {
        "run": config.run.name,
        "seed": config.run.seed,
        "steps": len(rows),
        "arms": {config.run.arm: arm},
        "rollouts": {
            "published": status.published,
            "trained": status.trained,
            "skipped": dict(sorted(status.skipped.items())),
            "stale": status.stale,
            "dead": status.dead,
            "pending": status.length,
        },
        "critiques": sum_counts(rows, "critiques"),
        "threads": threads,
        "wall_seconds": round(wall_seconds, 1),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    evaluation = config.run_dir / "evaluation.json"
    if evaluation.exists():
        figures = json.loads(evaluation.read_text(encoding="utf-8"))
        report["base"] = {"test": figures["base_test"], "validation": figures["validation"]["0"]}
        arm |= {
            "validation": figures["validation"],
            "selected_step": figures["selected_step"],
            "test": figures["selected_test"],
        }
        report["evaluation"] = {key: figures[key] for key in ("temperature", "max_new_tokens")}
    return report


def _advantages(row: dict[str, Any]) -> dict[str, Any]:
    keys = ("loss", "advantage_correct", "advantage_correct_below", "advantage_at_error", "advantage_after_error")
    return {key: row[key] for key in keys}


def write_report(config: Config, report: dict[str, Any]) -> Path:
    target = config.run_dir / "report.json"
    scratch = target.with_suffix(".tmp")
    scratch.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(scratch, target)
    return target
