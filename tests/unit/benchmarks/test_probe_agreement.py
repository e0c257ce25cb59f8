"""Whether a probe's scores agree with finished runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.probe_agreement import agreement, agreement_table, finished_below, ranks, spearman
from stepalign.errors import ConfigError
from stepalign_run.config import load_config
from stepalign_run.probing import ProbePlan, ProbeReport
from support.probes import probe_report_of

LAB = Path(__file__).parents[3] / "configs" / "lab.toml"
K = 4


def test_equal_values_share_their_rank() -> None:
    assert ranks([10, 30, 20, 30]) == [1, 3.5, 2, 3.5]


def test_spearman_is_worked_out_by_hand() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == 1.0
    assert spearman([1, 2, 3], [9, 5, 1]) == -1.0
    # Without ties: 1 − 6 Σd² / (n (n² − 1)) = 1 − 6 · 6 / 60.
    assert spearman([1, 2, 3, 4], [3, 1, 2, 4]) == pytest.approx(0.4)
    # Ranks 1 2 3 and 1.5 1.5 3: 1.5 / √(2 · 1.5).
    assert spearman([1, 2, 3], [5, 5, 6]) == pytest.approx(1.5 / 3**0.5)
    assert spearman([1, 2, 3], [5, 5, 5]) is None
    with pytest.raises(ValueError):
        spearman([1, 2], [1, 2, 3])


@pytest.fixture
def report(tmp_path: Path) -> ProbeReport:
    plan = ProbePlan(samples=2, arms={"stepalign": load_config(LAB, ["--run.arm", "stepalign"]).arm})
    return probe_report_of(load_config(LAB, ["--run.dir", str(tmp_path / "runs")]), plan)


def text_of(table: Any) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def marks(right: list[int], traces: list[int]) -> dict[str, Any]:
    return {"correct": right, "majority": [float(count > K / 2) for count in right], "trace_correct": traces}


def figures(right: list[int], traces: list[int]) -> dict[str, float]:
    return {f"avg_at_{K}": 100 * sum(right) / K / len(right), f"trace_at_{K}": 100 * sum(traces) / K / len(right)}


def write_run(
    folder: Path, report: ProbeReport, name: str, seed: int, right: list[int], traces: list[int], **terms: Any
) -> Path:
    """A finished run of arm ``name`` on the probe's terms, with these right samples on each test problem."""
    none = [0] * len(right)
    content = {
        "run": f"{name}-{seed}",
        "seed": seed,
        "steps": 10,
        "arms": {
            name: {
                **{"objective": "forward_kl", "context": "critique", "scope": "full", "condition": {}},
                **{"first_update": None, "last_update": None, "selected_step": 0},
                "validation": {"0": figures([0], [0])},
                "test": figures(right, traces),
            }
        },
        "base": {"test": figures(none, none), "validation": figures([0], [0])},
        "evaluation": {"temperature": 1.0, "max_new_tokens": 64},
        "rollouts": {"published": 0, "trained": 0, "skipped": {}, "stale": 0, "dead": 0, "pending": 0},
        **{"critiques": {}, "alarms": {}, "config": {}, "threads": 1, "wall_seconds": 1.0, "versions": {}},
        "by_problem": {
            "ids": {"validation": ["v"], "test": [f"t{i}" for i in range(len(right))]},
            "base": {"test": marks(none, none), "validation": marks([0], [0])},
            "validation": {"0": marks([0], [0])},
            "test": marks(right, traces),
        },
        "terms": {**report.terms, "evaluation": {"samples": K}, "steps": 10, **terms},
    }
    folder = folder / f"{name}-{seed}"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_scores_are_set_against_the_mean_over_seeds_of_finished_runs(tmp_path: Path, report: ProbeReport) -> None:
    write_run(tmp_path, report, "stepalign_scoped", 0, [4, 4], [4, 3])
    write_run(tmp_path, report, "stepalign", 0, [0, 0], [1, 1])
    write_run(tmp_path, report, "stepalign", 1, [2, 0], [1, 1])
    write_run(tmp_path, report, "refsol", 0, [2, 1], [0, 0])
    write_run(tmp_path, report, "fixed_negative", 0, [0, 1], [0, 0])
    write_run(tmp_path, report, "mine", 0, [4, 4], [0, 0])
    found = agreement(report, [tmp_path])
    assert [(a.arm, a.seeds, a.figures["avg"], a.figures["trace"]) for a in found.arms] == [
        ("stepalign_scoped", (0,), 100.0, 87.5),
        ("stepalign", (0, 1), 12.5, 25.0),
        ("refsol", (0,), 37.5, 0.0),
    ]
    assert found.left_out == ("fixed_negative", "mine", "null")
    # Scores rank 3 2 1; Avg ranks 3 1 2, Trace 3 2 1.
    assert found.correlations["avg"] == pytest.approx(0.5)
    assert found.correlations["trace"] == 1.0
    assert found.as_json()["spearman"] == {"avg": 0.5, "maj": pytest.approx(0.866, abs=1e-3), "pass": 0.0, "trace": 1.0}
    shown = text_of(agreement_table(found))
    assert "+0.50" in shown and "+1.00" in shown and "37.5" in shown


def test_runs_on_another_base_or_other_problems_are_refused(tmp_path: Path, report: ProbeReport) -> None:
    for name in ("stepalign", "refsol", "null"):
        write_run(tmp_path, report, name, 0, [1], [0], train="x", base="y")
    with pytest.raises(ConfigError, match="and the probe differ in base, train; probe with the configuration"):
        agreement(report, [tmp_path])


def test_two_arms_have_no_rank_correlation(tmp_path: Path, report: ProbeReport) -> None:
    folders = [write_run(tmp_path, report, name, 0, [1], [0]) for name in ("stepalign", "refsol", "mine")]
    with pytest.raises(ConfigError, match=r"2 arm\(s\) have both a score and a finished run"):
        agreement(report, folders)


def test_a_folder_without_finished_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(ConfigError, match="there is no finished run in it"):
        finished_below([tmp_path])
