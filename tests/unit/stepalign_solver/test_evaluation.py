"""Evaluation: selection, resuming, common random numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from stepalign.errors import ConfigError
from stepalign.problems import load_problems
from stepalign.scoring import Score
from stepalign.types import FinishReason, Problem
from stepalign_models.loading import load_policy
from stepalign_models.sampling import Completion, Sampler
from stepalign_run.config import Config
from stepalign_run.selection import evaluated_steps, select_step
from stepalign_solver import evaluation as evaluation_module
from stepalign_solver.evaluation import Evaluator, evaluate
from stepalign_solver.prompts import StudentPrompts

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


# 3 + 4 = 7, 7 * 7 = 9
QUESTION = "3 + 4 * 7"
SOLUTIONS = {
    "right": "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 9 </step_2> <answer> 9 </answer>",
    "lucky": "<step_1> 3 + 4 = 8 </step_1> <step_2> 8 * 7 = 9 </step_2> <answer> 9 </answer>",
    "wrong": "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 8 </step_2> <answer> 8 </answer>",
    "ungradable": "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 5 </step_2> <answer> 5 </answer>",
    "silent": "<step_1> 3 + 4 = 7 </step_1>",
}

LATEX = {
    "half": r"<step_1> so </step_1> <answer> \frac12 </answer>",
    "boxed": r"<step_1> so </step_1> <answer> \boxed{1/2} </answer>",
    "third": r"<step_1> so </step_1> <answer> \frac13 </answer>",
    "named": r"<step_1> so </step_1> <answer> x = \frac{1}{3} </answer>",
    "costly": "<step_1> so </step_1> <answer> 9**9**9 </answer>",
}


class Scripted(Sampler):
    """Gives these solutions, in the order of the draws; a name that ends in ``…`` is cut off before EOS."""

    def __init__(self, names: list[str]) -> None:
        self.names = list(names)

    def sample(self, prompts: Any, parameters: Any) -> list[Completion]:
        taken, self.names = self.names[: len(prompts)], self.names[len(prompts) :]
        return [
            Completion(
                token_ids=[1] * 10,
                text=(SOLUTIONS | LATEX)[name.rstrip("…")],
                finish_reason=FinishReason.LENGTH if name.endswith("…") else FinishReason.STOP,
                logprobs=[0.0] * 10,
            )
            for name in taken
        ]


def failing_on_five(answer: str, known_answer: str) -> bool:
    if answer == "5":
        raise RuntimeError("no such answer")
    return answer == known_answer


def scripted_score(
    make_config: Callable[..., Config], tokenizer: Any, monkeypatch: pytest.MonkeyPatch, *names: list[str]
) -> Score:
    """Each list is one problem's samples; the checker is the lab's, and the grader fails on the answer 5."""
    monkeypatch.setattr(evaluation_module, "load_grader", lambda name: failing_on_five)
    config = make_config("--evaluation.samples", str(len(names[0])), "--data.checker", "lab")
    problems = [Problem(id=f"v{i}", question=QUESTION, answer="9") for i in range(len(names))]
    prompts = StudentPrompts(config, tokenizer, problems, Path("problems.jsonl"))
    return evaluate(Scripted([name for of_problem in names for name in of_problem]), prompts, problems, config, "test")


def test_a_grader_error_is_neither_right_nor_wrong(
    make_config: Callable[..., Config], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = scripted_score(
        make_config,
        tokenizer,
        monkeypatch,
        ["right", "ungradable", "ungradable", "wrong"],
        ["right", "lucky", "right", "wrong"],
        ["ungradable"] * 4,  # leaves the figures altogether
    )
    by_problem = scored.by_problem
    assert (by_problem.correct, by_problem.graded) == ([1, 3, 0], [2, 4, 0])
    assert by_problem.trace_correct == [1, 2, 0]
    figures = scored.as_report()
    assert figures["grader_errors"] == 6
    assert figures["avg_at_4"] == pytest.approx(100 * (1 / 2 + 3 / 4) / 2)
    assert figures["trace_at_4"] == pytest.approx(100 * (1 / 2 + 2 / 4) / 2)
    assert figures["maj_at_4"] == pytest.approx(100 * (1 / 2 + 1) / 2)  # of 9 and 8, a vote each; 5 has none
    assert figures["pass_at_4"] == 100.0


def test_a_trace_is_right_only_with_a_right_answer_and_eos(
    make_config: Callable[..., Config], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = scripted_score(make_config, tokenizer, monkeypatch, ["right", "right…", "lucky", "wrong", "silent"])
    assert (scored.by_problem.correct, scored.by_problem.trace_correct) == ([2], [1])
    assert scored.as_report()["trace_at_5"] == 20.0 <= scored.as_report()["avg_at_5"] == 40.0


@pytest.mark.parametrize(
    ("grader", "correct", "majority", "errors"), [("math", [3, 2], [1.0, 0.0], 1), ("exact", [0, 0], [0.0, 0.0], 0)]
)
def test_a_report_judges_answers_by_what_they_mean(
    make_config: Callable[..., Config],
    tokenizer: Any,
    grader: str,
    correct: list[int],
    majority: list[float],
    errors: int,
) -> None:
    """Of the second problem's answers three thirds outvote two halves; the costly one is neither right nor wrong."""
    names = [
        ["half", "boxed", "half", "third", "third", "costly"],
        ["half", "boxed", "third", "named", "named", "third"],
    ]
    config = make_config("--evaluation.samples", "6", "--data.grader", grader)
    problems = [Problem(id=f"v{i}", question=QUESTION, answer="0.5") for i in range(2)]
    prompts = StudentPrompts(config, tokenizer, problems, Path("problems.jsonl"))
    scored = evaluate(Scripted([name for of in names for name in of]), prompts, problems, config, "test")
    assert scored.by_problem.correct == correct and scored.by_problem.majority == majority
    assert scored.as_report()["grader_errors"] == errors


def figures_of(row: dict[str, Any], samples: int) -> dict[str, float]:
    """The report's figures, from the lists alone."""
    lists = row["by_problem"]
    shares = [right / graded for right, graded in zip(lists["correct"], lists["graded"], strict=True) if graded]
    return {
        f"avg_at_{samples}": 100 * sum(shares) / len(shares),
        f"maj_at_{samples}": 100 * sum(lists["majority"]) / len(lists["majority"]),
        f"pass_at_{samples}": 100 * sum(right > 0 for right in lists["correct"]) / len(lists["correct"]),
        f"trace_at_{samples}": 100 * sum(lists["trace_correct"]) / sum(lists["graded"]),
    }


@pytest.fixture
def solvable(tmp_path: Path) -> tuple[str, ...]:
    """Options: problems that the lab's base sometimes solves, with its shipped model and an exact checker."""
    assets = Path(str(files("stepalign_lab"))) / "assets"
    chosen = [
        {"id": "two", "question": "3 + 4 * 7", "answer": "9"},
        {"id": "one", "question": "1 + 1 * 3", "answer": "6"},
        {"id": "zero", "question": "4 - 5 * 1 - 3 * 4 - 9 + 2", "answer": "7"},
    ]
    file = tmp_path / "solvable.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return (
        *("--model.path", str(assets / "solver"), "--data.validation", str(file), "--data.test", str(file)),
        *("--data.checker", "lab", "--evaluation.max_new_tokens", "64", "--evaluation.temperature", "1.5"),
        *("--evaluation.samples", "8", "--evaluation.batch", "24", "--trainer.steps", "1"),
    )


def test_the_lists_by_problem_reproduce_the_figures(
    make_config: Callable[..., Config], solvable: tuple[str, ...]
) -> None:
    config = make_config(*solvable)
    summary = Evaluator(config).run()
    rows = {(row["step"], row["split"]): row for row in rows_of(config)}
    assert rows.keys() == {(0, "validation"), (0, "test")}
    for row in rows.values():
        figures = row["figures"]
        assert figures["avg_at_8"] > 0 and figures["trace_at_8"] <= figures["avg_at_8"]
        for name, value in figures_of(row, 8).items():
            assert figures[name] == pytest.approx(value, abs=1e-3), name
        lists = row["by_problem"]
        assert {len(values) for values in lists.values()} == {3} and lists["graded"] == [8, 8, 8]
        assert all(t <= c for t, c in zip(lists["trace_correct"], lists["correct"], strict=True))
    assert summary["problem_ids"] == {"validation": ["two", "one", "zero"], "test": ["two", "one", "zero"]}
    assert summary["by_problem"]["validation"]["0"] == rows[0, "validation"]["by_problem"]
    assert summary["by_problem"]["base_test"] == rows[0, "test"]["by_problem"] == summary["by_problem"]["selected_test"]


def test_without_a_checker_there_is_no_trace_figure(run_config: Config) -> None:
    Evaluator(run_config).run()
    for row in rows_of(run_config):
        assert row["by_problem"]["trace_correct"] is None and "trace_at_2" not in row["figures"]


@pytest.mark.parametrize("change", [("--data.checker", "lab"), ("--data.grader", "strict")])
def test_figures_of_another_grader_or_checker_are_not_taken_over(
    run_config: Config, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, change: tuple[str, str]
) -> None:
    Evaluator(run_config).run()
    before = rows_of(run_config)
    monkeypatch.setattr(evaluation_module, "load_grader", lambda name: failing_on_five)
    Evaluator(make_config(*change)).run()
    assert len(rows_of(run_config)) == 2 * len(before)
