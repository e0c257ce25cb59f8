"""Comparing runs: figures worked out by hand, pairing, intervals that cover, and what is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner, Result

from stepalign.commands.application import build_app
from stepalign.commands.terminal import Table
from stepalign.errors import ConfigError
from stepalign_report.comparison import (
    HEADLINES,
    Comparison,
    Pair,
    compare,
    comparison_json,
    read_runs,
    selection_is_argmax,
    write_comparison,
)
from stepalign_report.intervals import Bootstrap, Interval
from stepalign_report.runs import METRICS, Run
from stepalign_report.tables import comparison_tables
from stepalign_run.config import shipped_arms

K = 4
CHANCE = {f"avg_at_{K}": 10.0, f"maj_at_{K}": 10.0, f"pass_at_{K}": 34.39}

Edit = Callable[[dict[str, Any]], None]


def marks(correct: Sequence[int], traces: Sequence[int] | None = None, **other: Any) -> dict[str, Any]:
    majority = [1.0 if 2 * count > K else 0.5 if 2 * count == K else 0.0 for count in correct]
    found = {"correct": list(correct), "graded": [K] * len(correct), "majority": majority}
    return {**found, "trace_correct": None if traces is None else list(traces), **other}


def percent(values: Sequence[float]) -> float:
    return round(100 * sum(values) / len(values), 4)


def figures(found: dict[str, Any]) -> dict[str, Any]:
    made = {
        f"avg_at_{K}": percent([count / K for count in found["correct"]]),
        f"maj_at_{K}": percent(found["majority"]),
        f"pass_at_{K}": percent([count > 0 for count in found["correct"]]),
        "mean_tokens": 38.4,
        "format_rate": 100.0,
        "truncated": 0.0,
        "grader_errors": 0,
        "problems": len(found["correct"]),
        "samples": K,
    }
    if found["trace_correct"] is not None:
        made[f"trace_at_{K}"] = percent([count / K for count in found["trace_correct"]])
    return made


def report(
    arm: str,
    seed: int,
    correct: Sequence[int],
    *,
    base: Sequence[int] | None = None,
    traces: Sequence[int] | None = None,
    validation: dict[int, Sequence[int]] | None = None,
    chance: dict[str, float] | None = None,
) -> dict[str, Any]:
    """``report.json`` of a run whose selected checkpoint has ``correct`` right samples on each test problem."""
    test = marks(correct, traces)
    of_base = marks([0] * len(correct) if base is None else base, None if traces is None else [0] * len(correct))
    steps = {step: marks(right) for step, right in (validation or {0: [0, 0], 10: [4, 2], 20: [3, 3]}).items()}
    by_step = {str(step): figures(found) for step, found in steps.items()}
    update = {
        "loss": 0.5,
        "advantage_correct": 0.0,
        "advantage_correct_below": 0.0,
        "advantage_at_error": -3.0,
        "advantage_after_error": None,
    }
    return {
        "run": f"{arm}-{seed}",
        "seed": seed,
        "steps": 20,
        "rollouts": {"published": 640, "trained": 640, "skipped": {}, "stale": 0, "dead": 0, "pending": 0},
        "critiques": {"incorrect": 640},
        "threads": 1,
        "wall_seconds": 100.5,
        "versions": {"python": "3.11.7", "stepalign": "0.1.0"},
        "base": {"test": figures(of_base), "validation": by_step["0"]},
        "evaluation": {"temperature": 1.0, "max_new_tokens": 64},
        "arms": {
            arm: {
                "objective": "forward_kl",
                "context": "critique",
                "scope": "full",
                "condition": {"objective": "forward_kl", "context": "critique", "scope": "full"},
                "test": figures(test),
                "validation": by_step,
                "selected_step": max(sorted(steps), key=lambda step: sum(steps[step]["correct"])),
                "first_update": update,
                "last_update": update,
            }
        },
        "terms": {
            "base": "a" * 64,
            "train": "b" * 64,
            "validation": "c" * 64,
            "test": "d" * 64,
            "evaluation": {
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": 0,
                "max_new_tokens": 64,
                "samples": K,
                "every": 10,
            },
            "sampling": {"temperature": 1.1, "top_p": 1.0, "top_k": 0, "max_new_tokens": 64},
            "batch": 32,
            "steps": 20,
        },
        "chance": chance,
        "by_problem": {
            "ids": {
                "validation": [f"v{i}" for i in range(len(next(iter(steps.values()))["correct"]))],
                "test": [f"t{i}" for i in range(len(correct))],
            },
            "base": {"test": of_base, "validation": steps[0]},
            "validation": {str(step): found for step, found in steps.items()},
            "test": test,
        },
        "alarms": {},
        "config": {},
    }


class Runs:
    """Folders of finished runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, arm: str, seed: int, correct: Sequence[int], *, edit: Edit | None = None, **other: Any) -> Path:
        content = report(arm, seed, correct, **other)
        if edit is not None:
            edit(content)
        return self.write(f"{arm}-{seed}", json.dumps(content))

    def write(self, name: str, text: str) -> Path:
        target = self.folder / name
        target.mkdir(parents=True, exist_ok=True)
        (target / "report.json").write_text(text)
        return target


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "runs")


def pair_of(comparison: Comparison, a: str, b: str) -> Pair:
    (found,) = [pair for pair in (*comparison.pairs, *comparison.against_base) if (pair.a, pair.b) == (a, b)]
    return found


def interval_of(comparison: Comparison, a: str, b: str, metric: Any = "avg") -> Interval:
    found = pair_of(comparison, a, b).differences[metric].interval
    assert found is not None
    return found


def texts(table: Table) -> dict[str, list[str]]:
    """The cells of each row, by the first one."""
    return {row[0].plain: [cell.plain for cell in row[1:]] for row in table.rows}


def text_of(tables: Sequence[Table]) -> str:
    console = Console(width=160)
    with console.capture() as captured:
        for table in tables:
            console.print(table)
    return captured.get()


# The bootstrap.


def test_the_interval_of_a_constant_difference_is_a_point() -> None:
    assert Bootstrap(7).interval(np.full((3, 7), 0.1)) == Interval(10.0, 10.0, 10.0)
    assert Bootstrap(7).interval(np.full((3, 7), -1 / 3)) == Interval(-33.3333, -33.3333, -33.3333)


@pytest.mark.parametrize(
    ("lower", "upper", "apart"),
    [(0.1, 2.0, True), (-2.0, -0.1, True), (-0.1, 2.0, False), (0.0, 2.0, False), (-2.0, 0.0, False)],
)
def test_an_interval_is_apart_from_0_when_it_excludes_it(lower: float, upper: float, apart: bool) -> None:
    assert Interval((lower + upper) / 2, lower, upper).apart_from_0 is apart


def test_the_interval_over_two_problems_is_worked_out_by_hand() -> None:
    """One seed, differences 0 and 1: the resampled mean is 0, 1/2 or 1 with chances 1/4, 1/2 and 1/4."""
    found = Bootstrap(2).interval(np.array([[0.0, 1.0]]))
    assert found == Interval(50.0, 0.0, 100.0)
    assert not found.apart_from_0


def test_the_interval_over_three_seeds_goes_from_the_worst_to_the_best() -> None:
    """The same seed is drawn three times in 1 of 27 resamples, which is more than the tail of 2.5 %."""
    seeds = np.array([[0.1] * 5, [0.2] * 5, [0.6] * 5])
    assert Bootstrap(5).interval(seeds) == Interval(30.0, 10.0, 60.0)


def test_a_drawn_problem_is_drawn_for_every_seed() -> None:
    """One problem of ten is 1 with every seed. Drawn for each seed by itself, the means would scatter less."""
    cells = np.zeros((3, 10))
    cells[:, 0] = 1.0
    one_seed = Bootstrap(10).interval(cells[:1])
    assert Bootstrap(10).interval(cells) == one_seed
    # The draws of that problem are binomial (10, 1/10): at most 2 with a chance of 93.0 %, at most 3 of 98.7 %.
    assert one_seed == Interval(10.0, 0.0, 30.0)


def test_noise_of_cells_is_counted_as_often_as_the_docstring_says() -> None:
    bootstrap, generator = Bootstrap(60, resamples=2000), np.random.default_rng(1)
    variances = [bootstrap.means(generator.normal(size=(3, 60))).var() for _ in range(200)]
    assert np.mean(variances) * 3 * 60 == pytest.approx((2 - 1 / 3) * (2 - 1 / 60) - 1, rel=0.1)


@given(
    st.integers(1, 4).flatmap(
        lambda seeds: st.lists(st.lists(st.integers(-4, 4), min_size=5, max_size=5), min_size=seeds, max_size=seeds)
    )
)
def test_an_interval_holds_its_difference_and_turns_with_its_sign(cells: list[list[int]]) -> None:
    bootstrap = Bootstrap(5, resamples=2000)
    values = np.array(cells) / 4
    found, turned = bootstrap.interval(values), bootstrap.interval(-values)
    assert 100 * values.min() <= found.lower <= found.difference <= found.upper <= 100 * values.max()
    assert turned.difference == -found.difference
    assert (turned.lower, turned.upper) == pytest.approx((-found.upper, -found.lower), abs=1e-3)


def coverage(seeds: int, spread: Callable[[np.random.Generator], np.ndarray]) -> float:
    """Share of 200 simulated comparisons whose interval holds the true difference, 20 points."""
    bootstrap, generator = Bootstrap(60, resamples=1000), np.random.default_rng(7)
    found = [bootstrap.interval(0.2 + spread(generator)) for _ in range(200)]
    return sum(interval.lower <= 20 <= interval.upper for interval in found) / len(found)


def test_intervals_cover_where_problems_differ() -> None:
    covered = coverage(3, lambda g: g.normal(0, 0.3, (1, 60)) + g.normal(0, 0.05, (3, 60)))
    assert 0.91 <= covered <= 0.99


def test_intervals_of_three_differing_seeds_are_too_narrow_as_documented() -> None:
    assert 0.67 <= coverage(3, lambda g: g.normal(0, 0.3, (3, 1)) + np.zeros((3, 60))) <= 0.83


# Comparisons.


def test_means_and_differences_are_worked_out_by_hand(runs: Runs) -> None:
    folders = [
        runs.add("stepalign_scoped", 0, [4, 4, 2, 0], base=[1, 0, 0, 0]),
        runs.add("stepalign_scoped", 1, [4, 3, 3, 0], base=[0, 0, 0, 0]),
        runs.add("refsol", 0, [2, 1, 0, 0], base=[1, 0, 0, 0]),
        runs.add("refsol", 1, [3, 0, 0, 0], base=[0, 0, 0, 0]),
    ]
    comparison = compare(read_runs(folders))
    scoped, refsol = comparison.arms
    assert (scoped.name, refsol.name) == ("stepalign_scoped", "refsol")
    assert scoped.by_seed["avg"] == {0: 62.5, 1: 62.5}
    assert refsol.by_seed["avg"] == {0: 18.75, 1: 18.75}
    assert [scoped.mean(metric) for metric in METRICS] == [62.5, 68.75, 75.0, None]
    assert [refsol.mean(metric) for metric in METRICS] == [18.75, 18.75, 37.5, None]
    assert [comparison.base.mean(metric) for metric in METRICS] == [3.125, 0.0, 12.5, None]
    assert scoped.selected_steps == {0: 10, 1: 10}
    assert interval_of(comparison, "stepalign_scoped", "refsol").difference == 43.75
    assert interval_of(comparison, "stepalign_scoped", "refsol", "maj").difference == 50.0
    assert interval_of(comparison, "stepalign_scoped", "refsol", "pass").difference == 37.5
    assert interval_of(comparison, "refsol", "base", "pass").difference == 25.0
    assert interval_of(comparison, "refsol", "base", "avg").difference == 15.625
    assert (comparison.seeds, comparison.problems, comparison.samples) == ((0, 1), 4, K)
    assert comparison.remarks == ()


def test_an_arm_that_is_constantly_better_has_a_point_for_an_interval(runs: Runs) -> None:
    folders = [runs.add("stepalign", seed, [3, 2, 4, 3]) for seed in (0, 1, 2)]
    folders += [runs.add("grpo", seed, [2, 1, 3, 2]) for seed in (0, 1, 2)]
    assert interval_of(compare(read_runs(folders)), "stepalign", "grpo") == Interval(25.0, 25.0, 25.0)


def test_identical_arms_differ_by_0(runs: Runs) -> None:
    folders = [runs.add(arm, seed, [seed, 4, 1, 0]) for arm in ("refsol", "grpo") for seed in (0, 1, 2)]
    comparison = compare(read_runs(folders))
    for metric in ("avg", "maj", "pass"):
        found = interval_of(comparison, "refsol", "grpo", metric)
        assert found == Interval(0.0, 0.0, 0.0) and not found.apart_from_0


def test_pairing_finds_what_separate_intervals_hide(runs: Runs) -> None:
    """Problems differ far more than arms: one arm has one sample of four more right on every second problem."""
    hard = [0, 0, 1, 1, 2, 2, 3, 3] * 3
    better = [count + i % 2 for i, count in enumerate(hard)]
    folders = [runs.add("stepalign", s, better) for s in (0, 1, 2)] + [runs.add("refsol", s, hard) for s in (0, 1, 2)]
    found = interval_of(compare(read_runs(folders)), "stepalign", "refsol")
    assert found.difference == 12.5 and found.apart_from_0
    # Unpaired: the two means resampled apart from each other.
    bootstrap, generator = Bootstrap(len(hard)), np.random.default_rng(5)
    apart = [
        np.array(values)[generator.integers(len(hard), size=(10_000, len(hard)))].mean(axis=1) / K
        for values in (better, hard)
    ]
    lower, upper = np.percentile(apart[0] - apart[1], [2.5, 97.5])
    assert lower < 0 < upper
    assert found.upper - found.lower < 100 * (upper - lower) / 2
    assert bootstrap.interval(np.array([better]) / K - np.array([hard]) / K) == found


def test_a_difference_uses_the_seeds_that_both_have(runs: Runs) -> None:
    folders = [runs.add("stepalign", seed, [4, 4]) for seed in (0, 1, 2)]
    folders += [runs.add("refsol", seed, [seed, 0]) for seed in (1, 2, 3)]
    found = pair_of(compare(read_runs(folders)), "stepalign", "refsol").differences["avg"]
    assert (found.seeds, found.over) == ((1, 2), "problems and seeds")
    assert found.interval is not None and found.interval.difference == 81.25


def test_a_pair_without_a_common_seed_is_not_comparable(runs: Runs) -> None:
    folders = [runs.add("stepalign", 0, [4, 4]), runs.add("refsol", 1, [0, 0]), runs.add("refsol", 2, [0, 0])]
    comparison = compare(read_runs(folders))
    found = pair_of(comparison, "stepalign", "refsol").differences["avg"]
    assert (found.interval, found.seeds, found.over) == (None, (), None)
    assert "stepalign and refsol have no seed in common: not comparable" in comparison.remarks
    assert "one seed only of stepalign: one seed proves nothing about an arm" in comparison.remarks[0]
    (_, differences, _) = comparison_tables(comparison)
    assert texts(differences)["stepalign − refsol"] == ["–", "not comparable", "–", "none"]
    assert differences.caption is None
    assert comparison.as_json()["pairs"][0]["metrics"]["avg"] == {
        "seeds": [],
        "difference": None,
        "lower": None,
        "upper": None,
        "apart_from_0": None,
        "over": None,
    }


def test_one_seed_has_intervals_over_problems_only_and_says_so(runs: Runs) -> None:
    better = [4, 3, 4, 0, 4]
    folders = [runs.add("stepalign", 5, better), runs.add("refsol", 5, [0, 0, 1, 0, 2])]
    comparison = compare(read_runs(folders))
    (said,) = comparison.remarks
    assert said == ("seed 5 only: one seed proves nothing about an arm; the intervals are over problems only")
    found = pair_of(comparison, "stepalign", "refsol").differences["avg"]
    assert found.over == "problems" and found.seeds == (5,)
    assert found.interval == Bootstrap(5).interval(np.array([[4, 3, 3, 0, 2]]) / K)


def test_several_seeds_are_named_and_nothing_is_remarked(runs: Runs) -> None:
    folders = [runs.add(arm, seed, [2, 1]) for arm in ("stepalign", "refsol") for seed in (0, 1, 2)]
    comparison = compare(read_runs(folders))
    assert comparison.remarks == ()
    arms, *others = comparison_tables(comparison)
    assert arms.title == "2 test problems, 4 samples each, seeds 0, 1, 2"
    assert [table.caption for table in others] == ["intervals over problems and seeds"] * 2


def test_a_table_with_both_says_what_its_intervals_are_over(runs: Runs) -> None:
    folders = [runs.add("stepalign", seed, [2, 1]) for seed in (0, 1)]
    folders += [runs.add("refsol", seed, [2, 1]) for seed in (0, 1)] + [runs.add("grpo", 0, [1, 1])]
    (_, differences, _) = comparison_tables(compare(read_runs(folders)))
    assert differences.caption == "intervals over problems and seeds or, with one seed, problems only"


def test_an_interval_does_not_depend_on_other_runs_or_on_their_order(runs: Runs) -> None:
    arms = {"stepalign_scoped": [4, 4, 3, 4], "mine": [2, 4, 0, 1], "grpo": [1, 0, 3, 0], "another": [0, 1, 1, 2]}
    drawn = random.Random(3)
    folders = [
        runs.add(arm, seed, [max(0, count - drawn.randrange(2)) for count in counts], chance=CHANCE)
        for arm, counts in arms.items()
        for seed in (0, 1, 2)
    ]
    read = read_runs(folders)
    expected = comparison_json(compare(read, resamples=500))
    for _ in range(5):
        drawn.shuffle(read)
        assert comparison_json(compare(read, resamples=500)) == expected
    two = compare([run for run in read if run.arm in ("stepalign_scoped", "grpo")], resamples=500)
    everything = compare(read, resamples=500)
    assert interval_of(two, "stepalign_scoped", "grpo") == interval_of(everything, "stepalign_scoped", "grpo")
    assert [arm.name for arm in everything.arms] == ["stepalign_scoped", "grpo", "another", "mine"]


def test_shipped_arms_stand_by_rank_and_are_compared_by_question(runs: Runs) -> None:
    comparison = compare(read_runs([runs.add(name, 0, [1, 2]) for name in shipped_arms()]), resamples=100)
    assert [arm.name for arm in comparison.arms] == [
        *("stepalign_scoped", "stepalign", "refsol", "grpo", "grpo_unleashed", "random_step_scope"),
        *("null", "fixed_negative", "shuffled", "other_problem", "full_repetition", "omission"),
    ]
    assert [f"{pair.a} − {pair.b}" for pair in comparison.pairs if pair.headline] == [
        "stepalign_scoped − grpo",
        "stepalign_scoped − refsol",
        "stepalign − refsol",
        "stepalign − grpo",
        "refsol − grpo",
        "grpo − grpo_unleashed",
        "stepalign_scoped − grpo_unleashed",
        "stepalign_scoped − stepalign",
        "stepalign_scoped − random_step_scope",
        "stepalign − null",
        "stepalign_scoped − null",
        "stepalign − fixed_negative",
        "stepalign_scoped − fixed_negative",
        "stepalign − shuffled",
        "stepalign_scoped − shuffled",
        "stepalign − other_problem",
        "stepalign_scoped − other_problem",
        "stepalign − full_repetition",
        "stepalign − omission",
    ]


def test_headlines_come_first_and_no_pair_is_missing_or_twice(runs: Runs) -> None:
    names = sorted({name for pair in HEADLINES for name in pair} | {"mine"})
    comparison = compare(read_runs([runs.add(name, 0, [1, 2]) for name in names]), resamples=100)
    assert [(pair.a, pair.b) for pair in comparison.pairs if pair.headline] == list(HEADLINES)
    assert [pair.headline for pair in comparison.pairs] == sorted((p.headline for p in comparison.pairs), reverse=True)
    found = {frozenset((pair.a, pair.b)) for pair in comparison.pairs}
    assert len(found) == len(comparison.pairs) == len(names) * (len(names) - 1) // 2
    assert [(pair.a, pair.b) for pair in comparison.against_base] == [(arm.name, "base") for arm in comparison.arms]


def test_only_existing_headline_pairs_are_shown_unless_all_are_asked_for(runs: Runs) -> None:
    comparison = compare(read_runs([runs.add(arm, 0, [1, 2]) for arm in ("stepalign", "refsol", "shuffled")]))
    some, everything = text_of(comparison_tables(comparison)), text_of(comparison_tables(comparison, everything=True))
    for pair in ("stepalign − refsol", "stepalign − shuffled"):
        assert pair in some and pair in everything
    assert "refsol − shuffled" not in some and "refsol − shuffled" in everything
    assert "grpo" not in everything


def test_traces_and_chance_are_shown_where_the_reports_have_them(runs: Runs) -> None:
    folders = [
        runs.add("stepalign", 0, [4, 2], traces=[3, 1], chance=CHANCE),
        runs.add("refsol", 0, [1, 2], traces=[0, 0], chance=CHANCE),
        runs.add("grpo", 0, [1, 2]),
    ]
    comparison = compare(read_runs(folders))
    assert comparison.chance == {"avg": 10.0, "maj": 10.0, "pass": 34.39}
    assert [arm.mean("trace") for arm in comparison.arms] == [50.0, 0.0, None]
    assert interval_of(comparison, "stepalign", "refsol", "trace").difference == 50.0
    assert "trace" not in pair_of(comparison, "stepalign", "grpo").differences
    arms, differences, passes = comparison_tables(comparison, "trace")
    rows = texts(arms)
    assert rows["chance"] == ["", "10.0", "10.0", "34.4", "–"]
    assert rows["stepalign"] == ["1", "75.0", "75.0", "100.0", "50.0"]
    assert list(rows) == ["chance", "base", "stepalign", "refsol", "grpo"]
    assert texts(differences) == {"stepalign − refsol": ["+50.00", "+25.00 to +75.00", "yes", "1"]}
    assert differences.caption == "intervals over problems only"
    assert "Trace@4" in str(differences.title) and "Pass@4 against the base" in str(passes.title)


def test_a_metric_that_no_run_has_is_refused(runs: Runs) -> None:
    comparison = compare(read_runs([runs.add("stepalign", 0, [1, 2])]))
    with pytest.raises(ConfigError, match=r"'trace'; run them again with data\.checker"):
        comparison_tables(comparison, "trace")
    assert "Trace" not in text_of(comparison_tables(comparison)) and "chance" not in text_of(
        comparison_tables(comparison)
    )


def test_one_run_is_compared_with_its_base(runs: Runs) -> None:
    comparison = compare(read_runs([runs.add("stepalign", 0, [1, 2, 0], base=[1, 0, 0])]))
    assert comparison.pairs == ()
    assert len(comparison_tables(comparison)) == 2
    assert interval_of(comparison, "stepalign", "base", "pass").difference == pytest.approx(100 / 3, abs=1e-4)


def test_an_arm_is_paired_with_the_base_of_its_seed(runs: Runs) -> None:
    """Per seed the arm is as good as the base was: 0 everywhere, which other seeds' bases would not give."""
    folders = [runs.add("stepalign", seed, base, base=base) for seed, base in ((0, [4, 0, 1]), (1, [0, 3, 0]))]
    assert interval_of(compare(read_runs(folders)), "stepalign", "base") == Interval(0.0, 0.0, 0.0)


def test_bases_of_one_seed_that_differ_are_averaged_and_said(runs: Runs) -> None:
    folders = [runs.add("stepalign", 0, [4, 4], base=[1, 0]), runs.add("refsol", 0, [4, 4], base=[2, 0])]
    comparison = compare(read_runs(folders))
    assert comparison.base.by_seed["avg"] == {0: 18.75}
    assert any("samples are not the same in all runs of seed 0 " in said for said in comparison.remarks)


def test_a_problem_that_could_not_be_graded_leaves_the_figures(runs: Runs) -> None:
    def ungraded(content: dict[str, Any]) -> None:
        content["by_problem"]["test"] |= {"graded": [4, 0, 2], "correct": [2, 0, 2], "majority": [0.5, 0.0, 1.0]}
        (arm,) = content["arms"].values()
        arm["test"] |= {"avg_at_4": 75.0, "maj_at_4": 75.0, "pass_at_4": 100.0, "grader_errors": 6}

    folders = [runs.add("stepalign", 0, [0, 0, 0], edit=ungraded), runs.add("refsol", 0, [1, 4, 1])]
    comparison = compare(read_runs(folders))
    assert [comparison.arms[0].mean(metric) for metric in ("avg", "maj", "pass")] == [75.0, 75.0, 100.0]
    assert interval_of(comparison, "stepalign", "refsol") == Interval(50.0, 25.0, 75.0)


def test_a_seed_without_a_problem_that_both_could_grade_is_not_comparable(runs: Runs) -> None:
    def ungraded(*which: int) -> Edit:
        def edit(content: dict[str, Any]) -> None:
            graded = [0 if i in which else K for i in range(2)]
            content["by_problem"]["test"] |= {"graded": graded, "correct": graded, "majority": [1.0, 1.0]}
            put(dict.fromkeys(("avg_at_4", "maj_at_4", "pass_at_4"), 100.0), "arms", "ARM", "test")(content)

        return edit

    folders = [
        runs.add("stepalign", 0, [4, 4], edit=ungraded(0)),
        runs.add("refsol", 0, [4, 4], edit=ungraded(1)),
        runs.add("stepalign", 1, [4, 4], edit=ungraded(0)),
        runs.add("refsol", 1, [4, 2]),
    ]
    found = pair_of(compare(read_runs(folders)), "stepalign", "refsol").differences["avg"]
    assert (found.seeds, found.interval) == ((1,), Interval(50.0, 50.0, 50.0))
    assert pair_of(compare(read_runs(folders[:2])), "stepalign", "refsol").differences["avg"].interval is None


# JSON.


def test_the_file_holds_everything_and_is_what_is_printed(runs: Runs, tmp_path: Path) -> None:
    folders = [
        runs.add(arm, seed, [seed + 1, 2, 0], traces=[1, 1, 0], chance=CHANCE)
        for arm in ("stepalign_scoped", "refsol", "mine")
        for seed in (0, 1)
    ]
    comparison = compare(read_runs(folders))
    target = tmp_path / "comparison.json"
    target.write_text(json.dumps({**comparison.as_json(), "samples": "old"}))
    write_comparison(target, comparison)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["comparison.json"]
    written = json.loads(target.read_text())
    assert written == comparison.as_json()
    assert target.read_text() == json.dumps(written, indent=1, sort_keys=True) + "\n"
    assert written["seeds"] == [0, 1] and written["bootstrap"]["resamples"] == 10_000
    assert written["chance"] == {"avg": 10.0, "maj": 10.0, "pass": 34.39}
    assert [arm["arm"] for arm in written["arms"]] == ["stepalign_scoped", "refsol", "mine"]
    assert written["arms"][0]["figures"]["avg"] == {"mean": 29.1667, "by_seed": {"0": 25.0, "1": 33.3333}}
    assert [(pair["a"], pair["b"], pair["headline"]) for pair in written["pairs"]] == [
        ("stepalign_scoped", "refsol", True),
        ("stepalign_scoped", "mine", False),
        ("refsol", "mine", False),
    ]
    for pair in (*written["pairs"], *written["against_base"]):
        assert sorted(pair["metrics"]) == sorted(METRICS)
        for found in pair["metrics"].values():
            assert set(found) == {"seeds", "difference", "lower", "upper", "apart_from_0", "over"}
    assert str(tmp_path) not in target.read_text()
    assert invoke(*folders, "--json").stdout == target.read_text()


# What is refused.


def refusal(*folders: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        compare(read_runs(folders), resamples=10)
    return str(caught.value)


def test_a_folder_without_a_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for folder in (tmp_path / "a", tmp_path / "nowhere"):
        assert refusal(folder).startswith(f"{folder}: there is no report.json in it; give the folder of a run")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"run": "a"}', '{"run": "a", "seed": 0, "steps": 1, "arms": {}}'])
def test_a_report_that_is_none_is_refused(runs: Runs, text: str) -> None:
    folder = runs.write("a", text)
    said = refusal(folder)
    assert said.startswith(f"{folder / 'report.json'} is no report of a run (") and "stepalign report" in said


def test_a_report_that_cannot_be_read_is_refused(runs: Runs) -> None:
    folder = runs.write("a", "")
    (folder / "report.json").write_bytes(b'{"run": "\xff"}')
    assert refusal(folder).startswith(f"{folder / 'report.json'} cannot be read")
    (folder / "report.json").unlink()
    (folder / "report.json").mkdir()
    assert refusal(folder).startswith(f"{folder / 'report.json'} cannot be read")


def without_evaluation(content: dict[str, Any]) -> None:
    for key in ("base", "evaluation", "by_problem", "chance"):
        del content[key]
    (arm,) = content["arms"].values()
    for key in ("test", "validation", "selected_step"):
        del arm[key]


def remove(*keys: str) -> Edit:
    def edit(content: dict[str, Any]) -> None:
        for key in keys:
            del content[key]

    return edit


def put(value: Any, *path: str) -> Edit:
    """Set a value; ``ARM`` in the path is the run's arm."""

    def edit(content: dict[str, Any]) -> None:
        inner = content
        for part in path[:-1]:
            inner = inner[next(iter(inner)) if part == "ARM" else part]
        inner[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (without_evaluation, "has no evaluation; set data.validation and data.test"),
        (remove("by_problem"), "missing: by_problem"),
        (remove("terms"), "terms: Field required"),
        (put(12, "steps"), "12 of 20 updates are made"),
        (put(0, "terms", "evaluation", "samples"), "terms.evaluation.samples"),
        (put(12, "terms", "evaluation", "samples"), "does not agree with itself"),
        (put([4, 5, 0], "by_problem", "test", "correct"), "counts more samples"),
        (put([4, 4], "by_problem", "test", "correct"), "2 entries of correct for 3 problems"),
        (put([1.0, 0.5], "by_problem", "base", "test", "majority"), "2 entries of majority for 3 problems"),
        (put([1.0, 1.5, 0.0], "by_problem", "test", "majority"), "by_problem.test.majority"),
        (put([0, 0, 0], "by_problem", "test", "graded"), "counts more samples"),
        (put([4, 4, 3], "by_problem", "test", "correct"), "its problems give 91.67"),
        (put(60.0, "arms", "ARM", "test", "maj_at_4"), "maj_at_4 is 60.00, its problems give"),
        (put({"0": marks([0, 0])}, "by_problem", "validation"), "by_problem.validation has no step 10"),
        (put({"other": 1.0}, "chance"), "chance has no figure for 4 samples"),
        (put([], "by_problem", "ids", "test"), "by_problem.ids.test"),
    ],
)
def test_a_report_that_cannot_be_compared_is_refused_with_its_folder(runs: Runs, edit: Edit, said: str) -> None:
    folder = runs.add("stepalign", 0, [4, 2, 1], edit=edit)
    message = refusal(folder)
    assert message.startswith(str(folder)) and said in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("name", ["base", "chance"])
def test_an_arm_with_the_name_of_another_row_is_refused(runs: Runs, name: str) -> None:
    assert f"an arm cannot be called '{name}'" in refusal(runs.add(name, 0, [1]))


def test_a_grader_that_failed_on_everything_is_refused(runs: Runs) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["by_problem"]["test"] |= {"graded": [0, 0], "correct": [0, 0], "majority": [0.0, 0.0]}

    assert "the grader failed on every sample of arms.stepalign.test" in refusal(
        runs.add("stepalign", 0, [0, 0], edit=edit)
    )


def test_two_runs_of_the_same_arm_and_seed_are_refused(runs: Runs) -> None:
    first = runs.add("stepalign", 3, [1, 2])
    second = runs.write("again", (first / "report.json").read_text())
    assert refusal(first, second) == (f"{first} and {second} are both of arm stepalign, seed 3; leave one of them out")
    assert "are both of arm stepalign, seed 3" in refusal(first, first)


def test_different_problems_are_refused(runs: Runs) -> None:
    first = runs.add("stepalign", 0, [1, 2, 3])
    other = runs.add("refsol", 0, [1, 2, 3], edit=put(["t0", "x1", "t2"], "by_problem", "ids", "test"))
    said = refusal(other, first)
    assert f"{first} and {other} were not evaluated on the same test problems" in said
    assert "problem 2 is 't1' and 'x1'" in said
    fewer = runs.add("grpo", 0, [1, 2])
    assert "3 and 2 problems" in refusal(first, fewer)
    swapped = runs.add("null", 0, [1, 2, 3], edit=put(["t1", "t0", "t2"], "by_problem", "ids", "test"))
    assert "the same test problems in the same order" in refusal(first, swapped)
    elsewhere = runs.add("omission", 0, [1, 2, 3], edit=put(["v0", "w"], "by_problem", "ids", "validation"))
    assert "the same validation problems" in refusal(first, elsewhere)


def test_different_terms_are_refused_and_each_is_named(runs: Runs) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["terms"]["batch"] = 16
        content["terms"]["sampling"]["temperature"] = 1.0
        content["terms"]["base"] = "e" * 64
        del content["terms"]["evaluation"]["top_k"]

    folders = [runs.add("stepalign", seed, [1, 2]) for seed in (0, 1)]
    other = runs.add("refsol", 0, [1, 2], edit=edit)
    said = refusal(*folders, other)
    assert f"terms.batch: 32 in {folders[0]} and 1 more, 16 in {other};" in said
    assert f"terms.sampling.temperature: 1.1 in {folders[0]} and 1 more, 1.0 in {other}." in said
    assert f"terms.base: {'a' * 16} in {folders[0]} and 1 more, {'e' * 16} in {other};" in said
    assert f"terms.evaluation.top_k: 0 in {folders[0]} and 1 more, absent in {other};" in said
    assert "terms.steps" not in said and "terms.test" not in said
    assert f"terms.batch: 32 in {folders[0]}, 16 in {other};" in refusal(other, folders[0])


def test_values_that_begin_alike_are_told_apart(runs: Runs) -> None:
    first = runs.add("stepalign", 0, [1, 2])
    other = runs.add("refsol", 0, [1, 2], edit=put("a" * 63 + "b", "terms", "base"))
    assert "terms.base" in refusal(first, other)


def test_different_chances_are_refused_but_one_may_be_missing(runs: Runs) -> None:
    first = runs.add("stepalign", 0, [1, 2], chance=CHANCE)
    other = runs.add("refsol", 0, [1, 2], chance={**CHANCE, "avg_at_4": 25.0})
    assert f"chance.avg: 10.0 in {first}, 25.0 in {other}" in refusal(first, other)
    assert compare(read_runs([first, runs.add("refsol", 1, [1, 2])])).chance is not None


def test_no_run_is_refused() -> None:
    assert "no run to compare" in refusal()


# The selected checkpoint.


@pytest.mark.parametrize(
    ("validation", "selected", "right"),
    [
        ({0: 0.0, 10: 50.0, 20: 40.0}, 10, True),
        ({0: 0.0, 10: 50.0, 20: 40.0}, 20, False),
        ({0: 0.0, 10: 50.0, 20: 50.0}, 10, True),
        ({0: 0.0, 10: 50.0, 20: 50.0}, 20, False),
        ({20: 50.0, 9: 50.0, 100: 50.0}, 9, True),
        ({0: 5.0, 10: 5.0}, 0, True),
        ({0: 0.0, 10: 50.0}, 30, False),
        ({}, 0, False),
    ],
)
def test_the_selected_step_is_the_earliest_of_the_best(
    runs: Runs, validation: dict[int, float], selected: int, right: bool
) -> None:
    (run,) = read_runs([runs.add("stepalign", 0, [1, 2])])
    assert selection_is_argmax(replace(run, validation=validation, selected_step=selected)) is right


@given(st.dictionaries(st.integers(0, 50), st.integers(0, 3), min_size=1))
def test_exactly_one_step_can_be_the_selected_one(best: dict[int, int]) -> None:
    run = Run(Path("a"), "a", "a", 0, None, {}, K, {}, {s: float(v) for s, v in best.items()}, 0, {}, {}, None)
    (selected,) = [step for step in best if selection_is_argmax(replace(run, selected_step=step))]
    assert all(best[selected] > value or (best[selected] == value and selected <= step) for step, value in best.items())


def test_a_report_whose_checkpoint_validation_did_not_pick_is_refused(runs: Runs) -> None:
    """Steps 10 and 20 have the same figure: 20 is the later one, 0 the worse."""
    for step in (0, 20, 30):
        folder = runs.add("stepalign", 0, [1, 2], edit=put(step, "arms", "ARM", "selected_step"))
        said = refusal(folder)
        assert said.startswith(f"{folder}: selected_step is {step}, which is not the earliest step with the highest")
    read_runs([runs.add("stepalign", 0, [1, 2], edit=put(10, "arms", "ARM", "selected_step"))])


# The command.


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(build_app(), ["compare", *map(str, arguments)], catch_exceptions=False)


def test_the_command_prints_tables_remarks_and_what_is_left_out(runs: Runs) -> None:
    folders = [runs.add(arm, 0, [4, 2, 1], chance=CHANCE) for arm in ("stepalign", "refsol", "shuffled")]
    done = invoke(*folders, "--metric", "pass")
    assert done.exit_code == 0
    assert "differences of Pass@4" in done.stdout
    assert "seed 0 only: one seed proves nothing about an arm; the intervals are over problems only" in done.stdout
    assert "1 more pair with stepalign compare --all" in done.stdout
    assert "compare --all" not in invoke(*folders, "--all").stdout
    assert "differences of Avg@4" in invoke(*folders).stdout


def test_an_unknown_option_or_metric_is_refused(runs: Runs) -> None:
    folder = runs.add("stepalign", 0, [1, 2])
    unknown = invoke(folder, "--metrc")
    assert unknown.exit_code == 2 and "--metrc" in unknown.output
    assert invoke(folder, "--metric", "mean").exit_code == 2


def test_two_arms_of_one_name_are_refused(runs: Runs) -> None:
    def with_beta(beta: float) -> Any:
        return put({"objective": "grpo", "grpo": {"beta": beta}}, "arms", "grpo", "condition")

    first, other = (runs.add("grpo", seed, [1, 2], edit=with_beta(beta)) for seed, beta in ((0, 0.05), (1, 0.0)))
    said = refusal(first, other)
    assert str(first) in said and str(other) in said and "both of an arm named 'grpo'" in said


def test_arms_without_a_critic_go_with_those_that_share_one(runs: Runs) -> None:
    same = {"weights": "c" * 64}
    asked = [runs.add(arm, 0, [1, 2], edit=put(same, "terms", "critic")) for arm in ("stepalign", "shuffled")]
    alone = runs.add("grpo", 0, [1, 2])
    assert len(compare(read_runs([*asked, alone]), resamples=10).arms) == 3
    other = runs.add("omission", 0, [1, 2], edit=put({"weights": "d" * 64}, "terms", "critic"))
    assert "terms.critic.weights" in refusal(alone, asked[0], other)
