"""The report of a finished run, from its queue and the files that its processes wrote."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from stepalign.scoring import chance
from stepalign_run.config import Config
from stepalign_run.folder.jsonl import read_object, read_rows
from stepalign_run.folder.report import ArmReport, Report, UpdateFigures
from stepalign_run.queue import QueueStatus
from stepalign_run.terms import run_terms

PACKAGES = ("stepalign", "torch", "transformers", "peft", "redis")

Row = dict[str, Any]


def sum_counts(rows: Iterable[Row], key: str) -> dict[str, int]:
    """The counts under ``key`` added up over the rows, by name."""
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row[key])
    return dict(sorted(total.items()))


def build_report(config: Config, status: QueueStatus, wall_seconds: float, threads: int) -> Report:
    """Assemble the report of a finished run. Evaluation figures are there when the run had evaluation problems."""
    folder = config.folder
    rows, figures = read_rows(folder.metrics), read_object(folder.evaluation)
    return Report.model_validate(
        {
            "run": config.run.name,
            "seed": config.run.seed,
            "steps": len(rows),
            "arms": {config.arm_name: _arm(config, rows, figures)},
            "rollouts": _rollouts(status),
            "critiques": sum_counts(rows, "critiques"),
            "alarms": _alarms(rows),
            "terms": run_terms(config) | (figures["problems_sha256"] if figures else {}),
            "config": config.as_report(),
            "threads": threads,
            "wall_seconds": round(wall_seconds, 1),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            **(_evaluation(config, figures) if figures else {}),
        }
    )


def _arm(config: Config, rows: list[Row], figures: Row) -> ArmReport:
    condition = config.arm.model_dump(mode="json")
    arm: dict[str, Any] = {
        **{key: condition[key] for key in ("objective", "context", "scope")},
        "condition": condition,
        "first_update": _update(rows[0]) if rows else None,
        "last_update": _update(rows[-1]) if rows else None,
    }
    if figures:
        arm |= {
            "validation": figures["validation"],
            "selected_step": figures["selected_step"],
            "test": figures["selected_test"],
        }
    return ArmReport.model_validate(arm)


def _update(row: Row) -> UpdateFigures:
    return UpdateFigures(**{key: row[key] for key in UpdateFigures.model_fields})


def _rollouts(status: QueueStatus) -> dict[str, Any]:
    return {
        "published": status.published,
        "trained": status.trained,
        "skipped": dict(sorted(status.skipped.items())),
        "stale": status.stale,
        "dead": status.dead,
        "pending": status.length,
    }


def _alarms(rows: list[Row]) -> dict[str, dict[str, int]]:
    """Each alarm with the update that it was first raised at, and how many updates raised it."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        for name in row["alarms"]:
            found.setdefault(name, {"first_step": row["step"], "updates": 0})["updates"] += 1
    return dict(sorted(found.items()))


def _evaluation(config: Config, figures: Row) -> dict[str, Any]:
    """The parts of the report that only an evaluated run has."""
    choices, samples = config.data.answer_choices, config.evaluation.samples
    by_problem = figures["by_problem"]
    return {
        "base": {"test": figures["base_test"], "validation": figures["validation"]["0"]},
        "evaluation": {key: figures[key] for key in ("temperature", "max_new_tokens")},
        "chance": chance(choices, samples) if choices is not None else None,
        "by_problem": {
            "ids": figures["problem_ids"],
            "base": {"test": by_problem["base_test"], "validation": by_problem["validation"]["0"]},
            "validation": by_problem["validation"],
            "test": by_problem["selected_test"],
        },
    }
