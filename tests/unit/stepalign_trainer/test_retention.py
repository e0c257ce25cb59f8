"""Which checkpoints stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stepalign_run.config import Config
from stepalign_trainer.durable.retention import prune

MakeConfig = Callable[..., Config]


def fill(config: Config, steps: range) -> None:
    for step in steps:
        (config.run_dir / "checkpoints" / f"step-{step:06d}").mkdir(parents=True, exist_ok=True)


def left(config: Config) -> list[int]:
    return sorted(int(path.name[-6:]) for path in (config.run_dir / "checkpoints").iterdir())


def score(config: Config, figures: dict[int, float]) -> None:
    rows = [
        {"step": step, "split": split, "figures": {"avg_at_2": value if split == "validation" else 100.0 - value}}
        for step, value in figures.items()
        for split in ("validation", "test")
    ]
    # A row that is still being written comes last.
    (config.run_dir / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')


@pytest.fixture
def config(make_config: MakeConfig, tmp_path: Path) -> Config:
    problems = tmp_path / "validation.jsonl"
    problems.write_text('{"question": "1 + 1", "answer": "2"}\n')
    evaluation = ("--evaluation.every", "3", "--evaluation.samples", "2", "--trainer.steps", "12")
    return make_config("--run.dir", str(tmp_path), "--data.validation", str(problems), *evaluation)


def test_without_validation_problems_the_newest_are_kept(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("--run.dir", str(tmp_path), "--trainer.keep_checkpoints", "3")
    fill(config, range(8, 12))
    prune(config)
    assert left(config) == [9, 10, 11]


def test_what_is_not_scored_yet_may_be_the_best(config: Config) -> None:
    fill(config, range(1, 12))
    prune(config)
    assert left(config) == [3, 6, 9, 10, 11]


def test_of_the_scored_the_best_by_validation_is_kept(config: Config) -> None:
    fill(config, range(1, 12))
    score(config, {0: 1.0, 3: 40.0, 6: 60.0, 9: 50.0})
    prune(config)
    assert left(config) == [6, 10, 11]
    prune(config)
    assert left(config) == [6, 10, 11]


def test_scores_of_another_number_of_samples_decide_nothing(config: Config) -> None:
    """As after a resume with another ``evaluation.samples``."""
    fill(config, range(1, 12))
    rows = [{"step": step, "split": "validation", "figures": {"avg_at_8": 90.0}} for step in (3, 6)]
    rows.append({"step": 9, "split": "validation", "figures": {"avg_at_2": 50.0}})
    (config.run_dir / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prune(config)
    assert left(config) == [3, 6, 9, 10, 11]
