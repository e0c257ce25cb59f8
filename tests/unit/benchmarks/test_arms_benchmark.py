"""The section of ``docs/results.md`` and the bounds, from a file of figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.arms_benchmark import check_bounds
from benchmarks.bench_lab import BOUNDS
from benchmarks.comparison_section import write_section
from stepalign_report.comparison import Comparison, compare, read_runs
from support.page_runs import write_run

PAGE = "# Results\n\nbefore\n\n<!-- bench-lab: begin -->\nold figures\n<!-- bench-lab: end -->\n\nafter\n"
FIRST = {
    "advantage_correct": -0.05,
    "advantage_correct_below": 0.07,
    "advantage_at_error": -11.0,
    "advantage_after_error": -1.5,
}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("runs")
    arms = ("stepalign_scoped", "refsol", "grpo")
    return compare(read_runs([write_run(folder / f"{a}-{s}", a, s) for a in arms for s in (0, 1)]), resamples=500)


def results(comparison: Comparison) -> dict[str, Any]:
    run = {"arm": "refsol", "seed": 1, "first_update": FIRST, "alarms": {"entropy": {"first_step": 9, "updates": 3}}}
    budget = {
        "command": "make bench-lab ARGS='--seed 0 --seed 1'",
        "rollouts_per_run": 3200,
        "comparison": comparison.as_json(),
        "bounds": check_bounds(comparison, BOUNDS),
        "runs": [run],
    }
    return {"budgets": {"100": budget}}


def test_the_section_holds_every_figure_and_leaves_the_rest_of_the_page(tmp_path: Path, comparison: Comparison) -> None:
    page = tmp_path / "results.md"
    page.write_text(PAGE)
    write_section(page, "lab", results(comparison))
    text = page.read_text()
    assert text.startswith("# Results\n\nbefore\n") and text.endswith("\n\nafter\n") and "old figures" not in text
    assert "`make bench-lab ARGS='--seed 0 --seed 1'`" in text
    assert "### 100 updates: 3200 rollouts per run, seeds 0, 1" in text
    for arm in comparison.arms:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{arm.name}` | ") and "(" in line)
        shown = ", ".join(f"{value:.1f}" for value in arm.by_seed["avg"].values())
        assert f"{arm.mean('avg'):.1f} ({shown})" in row
    (pair,) = (p for p in comparison.pairs if (p.a, p.b) == ("stepalign_scoped", "refsol"))
    interval = pair.differences["avg"].interval
    assert interval is not None and interval.apart_from_0
    line = next(line for line in text.splitlines() if line.startswith("| stepalign_scoped − refsol "))
    assert f"**{interval.difference:+.1f} ({interval.lower:+.1f} to {interval.upper:+.1f})**" in line
    assert "| `refsol` | -0.05 | 7 % | -11.0 | -1.5 |" in text
    assert "`refsol` seed 1: entropy from update 9 (3 updates)" in text


def test_writing_it_again_changes_nothing(tmp_path: Path, comparison: Comparison) -> None:
    page = tmp_path / "results.md"
    page.write_text(PAGE)
    write_section(page, "lab", results(comparison))
    once = page.read_text()
    write_section(page, "lab", results(comparison))
    assert page.read_text() == once


def test_a_page_without_the_markers_is_left_alone(tmp_path: Path, comparison: Comparison) -> None:
    page = tmp_path / "results.md"
    page.write_text("# Results\n")
    with pytest.raises(ValueError, match="once each"):
        write_section(page, "lab", results(comparison))
    assert page.read_text() == "# Results\n"


def test_a_bound_is_kept_only_by_a_large_enough_difference_apart_from_0(comparison: Comparison) -> None:
    bounds = {bound["what"]: bound for bound in check_bounds(comparison, BOUNDS)}
    assert set(bounds) == {"stepalign_scoped − grpo, Avg@12", "stepalign_scoped − refsol, Avg@12"}
    assert all(bound["kept"] for bound in bounds.values())
    one_arm = [pair for pair in comparison.pairs if (pair.a, pair.b) == ("stepalign_scoped", "grpo")]
    interval = one_arm[0].differences["avg"].interval
    assert interval is not None
    assert bounds["stepalign_scoped − grpo, Avg@12"]["value"] == interval.difference
