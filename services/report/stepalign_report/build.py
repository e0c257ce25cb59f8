"""``report.json``: what a run did, from its queue and the files that its processes wrote.

But for ``wall_seconds`` it is the same for the same seed, configuration, machine and thread count.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stepalign.errors import ConfigError
from stepalign.scoring import chance
from stepalign_run.config import Config
from stepalign_run.folder.files import replace_text
from stepalign_run.policy_store import file_sha256, open_policy_store, weights_sha256
from stepalign_run.queue import QueueStatus, open_queue, resolve_url

METRICS, EVALUATION, REPORT, RUN = "metrics.jsonl", "evaluation.json", "report.json", "run.json"
PAGE = "report.html"
FIGURES = (METRICS, EVALUATION)
PACKAGES = ("stepalign", "torch", "transformers", "peft", "redis")


@dataclass(frozen=True)
class RunState:
    """How far a run has come, as its server and its files say."""

    queue: QueueStatus
    finished: bool
    """Whether every process has done its part."""
    started_at: float
    """When the trainer first began, in seconds since the epoch; 0 before that."""
    ended_at: float
    """When the last figure was written."""
    threads: int


async def read_state(config: Config) -> RunState:
    """Ask the run's server and look into its folder. Raises ConfigError when no server is known, or as below."""
    began = _began(config)
    settings = config.queue.model_copy(update={"redis_url": resolve_url(config)})
    queue = open_queue(settings, config.run.name, consumer="report")
    policies = open_policy_store(settings, config.run.name)
    try:
        status, ended, latest = await queue.status(), await policies.finished(), await policies.latest()
    finally:
        await queue.close()
        await policies.close()
    trained = ended and latest is not None and latest.version >= config.trainer.steps
    return RunState(
        queue=status,
        finished=trained and _is_evaluated(config),
        started_at=began["started_at"] if began else 0.0,
        ended_at=_last_figure_at(config),
        threads=began["threads"] if began else 0,
    )


def stored_report(config: Config) -> dict[str, Any] | None:
    """The report that is there, if it tells of this run's end: of all its updates, and written after every figure.

    Raises ConfigError as below.
    """
    path = config.run_dir / REPORT
    if not path.exists() or path.stat().st_mtime < _last_figure_at(config):
        return None
    _began(config)
    content = read_json(path)
    return content if content["steps"] == config.trainer.steps else None


def _began(config: Config) -> dict[str, Any]:
    """``run.json``, what the trainer noted at its first start; empty before that.

    Raises ConfigError when the folder holds a run of another arm or seed, whose figures would go under a wrong name.
    """
    path = config.run_dir / RUN
    began = read_json(path)
    if began and (began.get("arm"), began.get("seed")) != (config.arm_name, config.run.seed):
        raise ConfigError(
            f"{path}: the run is of arm {began.get('arm')}, seed {began.get('seed')}; asked for are arm "
            f"{config.arm_name}, seed {config.run.seed}: set run.arm and run.seed (RUN_ARM and RUN_SEED in containers)"
        )
    return began


def _last_figure_at(config: Config) -> float:
    written = [path.stat().st_mtime for name in FIGURES if (path := config.run_dir / name).exists()]
    return max(written, default=0.0)


def _is_evaluated(config: Config) -> bool:
    if config.data.validation is None or config.data.test is None:
        return True
    return str(config.trainer.steps) in read_json(config.run_dir / EVALUATION).get("validation", {})


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one when it is not there yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


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
    rows = read_rows(config.run_dir / METRICS)
    arm: dict[str, Any] = {
        **config.arm.model_dump(mode="json", include={"objective", "context", "scope"}),
        "condition": config.arm.model_dump(mode="json"),
        "first_update": _advantages(rows[0]) if rows else None,
        "last_update": _advantages(rows[-1]) if rows else None,
    }
    report: dict[str, Any] = {
        "run": config.run.name,
        "seed": config.run.seed,
        "steps": len(rows),
        "arms": {config.arm_name: arm},
        "rollouts": {
            "published": status.published,
            "trained": status.trained,
            "skipped": dict(sorted(status.skipped.items())),
            "stale": status.stale,
            "dead": status.dead,
            "pending": status.length,
        },
        "critiques": sum_counts(rows, "critiques"),
        "alarms": _alarms(rows),
        "terms": run_terms(config),
        "config": config.as_report(),
        "threads": threads,
        "wall_seconds": round(wall_seconds, 1),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    figures = read_json(config.run_dir / EVALUATION)
    if figures:
        report["base"] = {"test": figures["base_test"], "validation": figures["validation"]["0"]}
        arm |= {
            "validation": figures["validation"],
            "selected_step": figures["selected_step"],
            "test": figures["selected_test"],
        }
        report["evaluation"] = {key: figures[key] for key in ("temperature", "max_new_tokens")}
        choices, samples = config.data.answer_choices, config.evaluation.samples
        report["chance"] = chance(choices, samples) if choices is not None else None
        by_problem = figures["by_problem"]
        report["by_problem"] = {
            "ids": figures["problem_ids"],
            "base": {"test": by_problem["base_test"], "validation": by_problem["validation"]["0"]},
            "validation": by_problem["validation"],
            "test": by_problem["selected_test"],
        }
        report["terms"] |= figures["problems_sha256"]
    return report


NO_HYPERPARAMETERS = {
    *("steps", "batch", "micro_batch", "logit_chunk", "token_view", "max_staleness"),
    *("checkpoint_every", "keep_checkpoints"),
}


def run_terms(config: Config) -> dict[str, Any]:
    """What two runs must share to be compared; ``critic`` is there in arms that ask one."""
    terms: dict[str, Any] = {
        "base": weights_sha256(config.model.path),
        "model": config.model.model_dump(mode="json", exclude={"path", "device"}),
        "hyperparameters": config.trainer.model_dump(mode="json", exclude=NO_HYPERPARAMETERS),
        "train": file_sha256(config.data.train),
        "grader": config.data.grader,
        "evaluation": config.evaluation.model_dump(mode="json", exclude={"batch"}),
        "sampling": config.solver.parameters(seed=0).model_dump(mode="json", exclude={"seed"}),
        "batch": config.trainer.batch,
        "steps": config.trainer.steps,
    }
    if config.arm.needs_critic:
        critic = config.critic
        terms["critic"] = critic.shaping() | {
            "weights": weights_sha256(critic.path) if critic.path is not None else None
        }
    return terms


def _alarms(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Each alarm with the update that it was first raised at, and how many updates raised it."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        for name in row["alarms"]:
            found.setdefault(name, {"first_step": row["step"], "updates": 0})["updates"] += 1
    return dict(sorted(found.items()))


def _advantages(row: dict[str, Any]) -> dict[str, Any]:
    keys = ("loss", "advantage_correct", "advantage_correct_below", "advantage_at_error", "advantage_after_error")
    return {key: row[key] for key in keys}


def write_report(config: Config, report: dict[str, Any]) -> Path:
    target = config.run_dir / REPORT
    replace_text(target, json.dumps(report, indent=1, sort_keys=True) + "\n")
    return target
