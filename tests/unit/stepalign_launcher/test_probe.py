"""``stepalign probe`` in the lab: what is started, what is shown, and whether it agrees with finished runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.probe_agreement import agreement, finished_below, ranks, spearman
from stepalign.errors import ConfigError
from stepalign_launcher.probe import LocalProbe, load_arms
from stepalign_report.build import run_terms
from stepalign_report.probe_tables import agreement_table, probe_tables, recommendation, remarks
from stepalign_run.config import shipped_arms
from stepalign_run.context import ContextKind
from stepalign_run.probing import (
    PROBE,
    ArmFigures,
    ContextFigures,
    Contrast,
    CritiqueFigures,
    Estimate,
    ProbeReport,
)

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


def estimate(value: float, width: float = 0.0) -> Estimate:
    return Estimate(value=value, lower=value - width, upper=value + width)


def arm(name: str, score: float | None, width: float = 0.0, **changes: Any) -> ArmFigures:
    fields: dict[str, Any] = {
        "arm": name,
        "objective": "forward_kl",
        "context": "critique",
        "scope": "full",
        "solve_rate": 1.0,
        "focus": score,
        "score": None if score is None else estimate(score, width),
    }
    return ArmFigures.model_validate(fields | changes)


@pytest.fixture
def local(tmp_path: Path) -> Callable[..., LocalProbe]:
    def make(*overrides: str, arms: tuple[str, ...] = ("stepalign", "null"), rollouts: int = 8) -> LocalProbe:
        return LocalProbe(LAB, ["--run.dir", str(tmp_path / "runs"), *overrides], arms, rollouts, samples=2)

    return make


@pytest.fixture
def report(local: Callable[..., LocalProbe]) -> ProbeReport:
    """Four arms with scores, one without; one critique in four was refused."""
    probe = local(arms=tuple(shipped_arms()))
    terms = run_terms(probe.config)
    contrast = Contrast(correct=0.0, below=0.0, at_error=-14.25, tail=-1.5)
    context = ContextFigures(
        kind=ContextKind.CRITIQUE,
        rollouts=3,
        left_out={"critique_truncated": 1},
        solve_rate=estimate(0.75, 0.125),
        trace_rate=0.5,
        grader_errors=0,
        solution_gain=0.25,
        solutions=3,
        contrast=contrast,
    )
    return ProbeReport(
        run="lab-probe",
        seed=0,
        rollouts=4,
        with_error=3,
        unlocated=0,
        samples=2,
        contexts=[context],
        critiques=CritiqueFigures(rollouts=4, validated={"incorrect": 3}, refused={"truncated": 1}),
        student=None,
        arms=[
            arm("stepalign_scoped", 0.9, 0.05, scope="through_first_error"),
            arm("stepalign", 0.3),
            arm("refsol", 0.2, context="reference"),
            arm("null", 0.0, context="null", focus=None),
            arm("fixed_negative", None, objective="fixed_negative", context=None, note="no prediction"),
        ],
        terms={key: terms[key] for key in ("base", "train", "grader", "sampling")},
        plan=probe.plan,
        config=probe.config.as_report(),
        versions={},
    )


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
        "arms": {name: {"selected_step": 0, "validation": {"0": figures([0], [0])}, "test": figures(right, traces)}},
        "base": {"test": figures(none, none)},
        "by_problem": {
            "ids": {"validation": ["v"], "test": [f"t{i}" for i in range(len(right))]},
            "base": {"test": marks(none, none)},
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


def test_a_probe_has_a_run_folder_of_its_own_and_one_rollout_of_each_problem(
    local: Callable[..., LocalProbe], tmp_path: Path
) -> None:
    probe = local("--run.name", "mine", "--trainer.steps", "70", rollouts=400)
    config = probe.config
    assert config.run_dir == tmp_path / "runs" / "mine-probe"
    assert (config.trainer.steps, config.trainer.batch, config.queue.capacity) == (1, 400, 800)
    assert config.arm.group_size == 1
    assert local(rollouts=1000).config.trainer.batch == 500
    assert probe.needs_critic and not local(arms=("refsol", "grpo")).needs_critic


def test_arms_are_those_that_runs_would_have(tmp_path: Path) -> None:
    own = tmp_path / "mine.toml"
    own.write_text('context = "reference"\n', encoding="utf-8")
    found = load_arms(LAB, [], ["grpo", str(own)])
    assert list(found) == ["grpo", "mine"]
    assert found["grpo"].group_size == 8 and found["mine"].context is ContextKind.REFERENCE


@pytest.mark.parametrize(
    ("overrides", "arms", "message"),
    [
        ((), ("nothing",), "there is no arm 'nothing'"),
        ((), ("null", "null"), "two arms are called 'null'"),
        (("--run.arm", "null"), ("null",), "choose them with --arm"),
        (("--run.arm=null",), ("null",), "choose them with --arm"),
        (("--trainer.batch", "12"), ("grpo",), "multiple of arm.group_size"),
        (("--data.train", "none.jsonl"), ("null",), "none.jsonl"),
    ],
)
def test_what_cannot_be_probed_is_refused(
    overrides: tuple[str, ...], arms: tuple[str, ...], message: str, local: Callable[..., LocalProbe]
) -> None:
    from stepalign.errors import StepalignError

    with pytest.raises(StepalignError, match=message):
        local(*overrides, arms=arms)


def test_a_run_with_the_probes_name_is_not_replaced(local: Callable[..., LocalProbe]) -> None:
    probe = local()
    probe.config.run_dir.mkdir(parents=True)
    (probe.config.run_dir / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"holds a run; choose another --run\.name"):
        probe.run(lambda: None)
    assert (probe.config.run_dir / "run.json").exists()


def test_an_earlier_probe_is_found_only_for_the_same_plan_settings_and_weights(
    local: Callable[..., LocalProbe], report: ProbeReport
) -> None:
    arms = tuple(shipped_arms())
    probe = local(arms=arms)
    assert probe.stored() is None
    probe.config.run_dir.mkdir(parents=True)
    path = probe.config.run_dir / PROBE
    path.write_text(report.model_dump_json(), encoding="utf-8")
    assert probe.stored() == report
    assert local(arms=arms[1:]).stored() is None
    assert local(arms=arms, rollouts=9).stored() is None
    assert local("--run.seed", "1", arms=arms).stored() is None
    other = report.model_copy(update={"terms": {**report.terms, "base": "of other weights"}})
    path.write_text(other.model_dump_json(), encoding="utf-8")
    assert probe.stored() is None
    path.write_text("{}", encoding="utf-8")
    assert probe.stored() is None


def text_of(*tables: Any) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    return capture.get()


def test_the_tables_fit_80_columns_and_show_contexts_arms_and_critiques(report: ProbeReport) -> None:
    shown = text_of(*probe_tables(report))
    assert "…" not in shown
    contexts, rest = shown.split("arms, best score first")
    arms, critiques = rest.split("critiques of 4 rollouts")
    row = next(line for line in contexts.splitlines() if line.startswith("critique "))
    assert row.split() == ["critique", "75", "(62–88)", "50.0", "0.25", "0.00", "0.0", "-14.25", "-1.50"]
    rows = [line.split() for line in arms.splitlines()]
    assert ["1", "stepalign_scoped", "critique,", "to", "first", "error", "0.900", "0.900", "(0.850–0.950)"] in rows
    assert ["–", "fixed_negative", "fixed_negative", "–", "–"] in rows
    assert ["refused:", "truncated", "1", "25.0"] in [line.split() for line in critiques.splitlines()]


def test_remarks_name_what_was_left_out_and_end_with_the_recommendation(report: ProbeReport) -> None:
    notes = remarks(report)
    assert notes[0] == "fixed_negative: no prediction"
    assert notes[1] == "critique: 3 of 4 rollouts; left out: critique_truncated 1"
    assert notes[-1].startswith("worth running first: stepalign_scoped. Caveat: a probe sees the base model")
    unlocated = remarks(report.model_copy(update={"unlocated": 2}))
    assert any(note.startswith("of 2 rollouts it is not known where they err") for note in unlocated)


def test_arms_whose_intervals_overlap_are_not_told_apart() -> None:
    close = recommendation([arm("a", 0.5, 0.1), arm("b", 0.375, 0.05), arm("c", 0.3, 0.05), arm("d", None)])
    assert close.startswith("worth running first: a (not told apart from it: b). Caveat:")
    assert recommendation([arm("a", 0.0), arm("b", None)]) == "no arm can be recommended: none has a score above 0"
