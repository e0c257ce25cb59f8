"""Evaluation: selection, resuming, common random numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepalign.config import Config
from stepalign.errors import ConfigError
from stepalign.problems import load_problems
from stepalign_solver.evaluation import Evaluator, evaluate, evaluated_steps, select_step
from stepalign_solver.policy import load_policy
from stepalign_solver.sampling import Completion, Sampler
from stepalign_solver.worker import StudentPrompts

SENTINEL = 123.0


@pytest.fixture
def run_config(make_config: Callable[..., Config], save_adapter: Callable[..., Path]) -> Config:
    """A run of two steps with both adapters published."""
    config = make_config()
    for step in (1, 2):
        save_adapter(config.run_dir / "adapters" / f"v{step:06d}", seed=step)
    return config


def rows_of(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "evaluation.jsonl").read_text().splitlines()]


def test_the_earliest_of_equally_good_checkpoints_is_selected() -> None:
    figures = {30: 7.5, 0: 1.0, 20: 9.0, 10: 9.0}
    assert select_step({step: {"avg_at_2": value} for step, value in figures.items()}, "avg_at_2") == 10
    assert select_step({step: {"avg_at_2": 4.0} for step in (10, 0)}, "avg_at_2") == 0


def test_base_and_last_step_are_always_evaluated(make_config: Callable[..., Config]) -> None:
    assert evaluated_steps(make_config("--trainer.steps", "7", "--evaluation.every", "3")) == [0, 3, 6, 7]
    assert evaluated_steps(make_config("--trainer.steps", "2", "--evaluation.every", "9")) == [0, 2]


def test_validation_picks_and_only_base_and_pick_see_the_test_problems(run_config: Config) -> None:
    summary = Evaluator(run_config).run()
    averages = {int(step): figures["avg_at_2"] for step, figures in summary["validation"].items()}
    selected = min(step for step in averages if averages[step] == max(averages.values()))
    assert set(averages) == {0, 1, 2} and summary["selected_step"] == selected
    assert {(r["step"], r["split"]) for r in rows_of(run_config)} == {
        *((step, "validation") for step in (0, 1, 2)),
        (0, "test"),
        (selected, "test"),
    }
    assert json.loads((run_config.run_dir / "evaluation.json").read_text()) == summary


def test_an_interrupted_evaluation_goes_on_where_it_stopped(run_config: Config) -> None:
    whole = Evaluator(run_config).run()
    rows = rows_of(run_config)
    for row in rows[:2]:
        row["figures"]["mean_tokens"] = SENTINEL  # shows that the row was read, not made again
    kept = "".join(json.dumps(row) + "\n" for row in rows[:2])
    (run_config.run_dir / "evaluation.jsonl").write_text(kept + json.dumps(rows[2])[:25])
    resumed = Evaluator(run_config).run()
    assert [resumed["validation"][step]["mean_tokens"] == SENTINEL for step in "012"] == [True, True, False]
    assert resumed["validation"]["2"] == whole["validation"]["2"]
    again = rows_of(run_config)  # every line is whole again
    assert again[:2] == rows[:2] and again[2:] == rows[2:]


def test_a_replaced_adapter_is_evaluated_again(run_config: Config, save_adapter: Callable[..., Path]) -> None:
    Evaluator(run_config).run()
    rows = rows_of(run_config)
    for row in rows:
        row["figures"]["mean_tokens"] = SENTINEL
    (run_config.run_dir / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_adapter(run_config.run_dir / "adapters" / "v000001", seed=77)
    validation = Evaluator(run_config).run()["validation"]
    assert [validation[step]["mean_tokens"] == SENTINEL for step in "012"] == [True, False, True]


def test_figures_of_other_settings_are_not_taken_over(
    run_config: Config, make_config: Callable[..., Config], save_adapter: Callable[..., Path]
) -> None:
    Evaluator(run_config).run()
    summary = Evaluator(make_config("--evaluation.max_new_tokens", "2")).run()
    assert summary["max_new_tokens"] == 2
    assert all(figures["mean_tokens"] <= 2 for figures in summary["validation"].values())


def test_a_checkpoint_that_never_came_is_left_out_and_with_a_wait_awaited(
    make_config: Callable[..., Config], save_adapter: Callable[..., Path]
) -> None:
    config = make_config("--evaluation.every", "2")
    assert set(Evaluator(config).run()["validation"]) == {"0"}
    waits: list[int] = []

    def wait() -> None:
        waits.append(1)
        if len(waits) == 3:
            save_adapter(config.run_dir / "adapters" / "v000002")

    assert set(Evaluator(config, wait).run()["validation"]) == {"0", "2"}
    assert len(waits) == 3


def test_evaluation_needs_problems(make_config: Callable[..., Config]) -> None:
    config = make_config()
    without = config.model_copy(update={"data": config.data.model_copy(update={"test": None})})
    with pytest.raises(ConfigError, match="evaluation needs"):
        Evaluator(without)


class Recording(Sampler):
    """The real sampler; it also writes down which seed each prompt was drawn with."""

    def sample(self, prompts: Any, parameters: Any) -> list[Completion]:
        self.drawn: list[tuple[tuple[int, ...], int]] = getattr(self, "drawn", [])
        self.drawn += [(tuple(prompt), p.seed) for prompt, p in zip(prompts, parameters, strict=True)]
        return super().sample(prompts, parameters)


def draws_of(config: Config, tokenizer: Any, adapter: Path | None, split: str) -> list[tuple[tuple[int, ...], int]]:
    sampler = Recording(load_policy(config.model, adapter, merge=True), tokenizer)
    assert config.data.validation is not None
    problems = load_problems(config.data.validation)
    evaluate(sampler, StudentPrompts(config, tokenizer, problems, config.data.validation), problems, config, split)
    return sampler.drawn


def test_checkpoints_are_compared_on_common_random_numbers(
    run_config: Config, make_config: Callable[..., Config], tokenizer: Any
) -> None:
    base = draws_of(run_config, tokenizer, None, "validation")
    assert len(set(base)) == 4 and len({seed for _, seed in base}) == 4  # two problems, two samples
    assert draws_of(run_config, tokenizer, run_config.run_dir / "adapters" / "v000001", "validation") == base
    assert draws_of(make_config("--evaluation.batch", "1"), tokenizer, None, "validation") == base
    assert not {seed for _, seed in draws_of(run_config, tokenizer, None, "test")} & {seed for _, seed in base}
    assert draws_of(make_config("--run.seed", "4"), tokenizer, None, "validation") != base


def test_an_adapter_that_changes_nothing_scores_like_the_base(
    make_config: Callable[..., Config], save_adapter: Callable[..., Path]
) -> None:
    config = make_config("--trainer.steps", "1")
    save_adapter(config.run_dir / "adapters" / "v000001", scale=0.0)
    summary = Evaluator(config).run()
    assert summary["validation"]["0"] == summary["validation"]["1"]
    assert summary["selected_step"] == 0 and summary["base_test"] == summary["selected_test"]
