"""report.html: what it holds, that it loads nothing, and that no text of a rollout can get out of its data."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepalign.errors import ConfigError
from stepalign_report.measures import estimate, problem_values
from stepalign_report.page import build_page, write_page
from stepalign_report.page.data import page_data
from stepalign_report.page.page import SCRIPTS, STYLES
from stepalign_run.folder.report import Marks
from support.page_runs import PROBLEMS, SAMPLES, write_run

HOSTILE = "</script><img src=x onerror=alert(1)><!--<script>"


class _Parsed(HTMLParser):
    """Elements with their attributes, and the text of the data element, as a browser's parser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self._in_data = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_data = dict(attrs).get("id") == "data"

    def handle_endtag(self, tag: str) -> None:
        self._in_data = False

    def handle_data(self, data: str) -> None:
        self.data += data if self._in_data else ""


def data_of(page: str) -> dict[str, Any]:
    return json.loads(_Parsed(page).data)


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def edit_report(folder: Path, **changes: Any) -> Path:
    (folder / "report.json").write_text(json.dumps(report_of(folder) | changes))
    return folder


def test_the_page_holds_the_figures_the_updates_and_the_tokens(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo", name="demo", alarms={"entropy": {"first_step": 3, "updates": 2}})
    data, report = data_of(build_page([folder])), report_of(folder)
    (run,) = data["runs"]
    kept = ("rollouts", "critiques", "alarms", "wall_seconds", "versions", "seed", "steps")
    assert {key: run[key] for key in kept} == {key: report[key] for key in kept}
    updates = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert run["updates"]["loss"] == pytest.approx([row["loss"] for row in updates], abs=1e-6)
    rows = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in run["tokens"]] == [row["tokens"] for row in rows]
    for mine, row in zip(run["tokens"], rows, strict=True):
        for kind, context in row["contexts"].items():
            assert mine["contexts"][kind]["advantage"] == pytest.approx(context["advantage"], abs=1e-4)
    arm = report["arms"]["stepalign_scoped"]
    shown = {row["kind"]: row for row in data["results"]}
    assert shown["arm"]["avg"]["value"] == pytest.approx(arm["test"][f"avg_at_{SAMPLES}"], abs=1e-3)
    assert shown["arm"]["step"] == arm["selected_step"]
    assert shown["base"]["pass"]["value"] == pytest.approx(report["base"]["test"][f"pass_at_{SAMPLES}"], abs=1e-3)
    assert shown["chance"]["avg"] == {"value": 10.0}


def test_curve_intervals_are_those_of_a_plain_bootstrap(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / str(seed), seed=seed) for seed in (0, 1, 2)]
    (curve,) = page_data(folders)["curves"]
    step = curve["steps"].index(30)
    marks = [report_of(folder)["by_problem"]["validation"]["30"] for folder in folders]
    values = {
        "avg": np.array([mark["correct"] for mark in marks]) / SAMPLES,
        "maj": np.array([mark["majority"] for mark in marks]),
        "pass": np.array([mark["correct"] for mark in marks]) > 0,
        "trace": np.array([mark["trace_correct"] for mark in marks]) / SAMPLES,
    }
    rng = np.random.default_rng(7)
    for metric, of_metric in values.items():
        means = []
        for _ in range(4000):
            drawn = of_metric[rng.integers(0, 3, 3)][:, rng.integers(0, PROBLEMS, PROBLEMS)]
            means.append(100 * drawn.mean())
        found = curve[metric][step]
        assert found["value"] == pytest.approx(100 * of_metric.mean(), abs=1e-3)
        assert (found["low"], found["high"]) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.9)


def test_a_page_is_a_function_of_its_runs(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo")
    assert build_page([folder]) == build_page([folder])


def test_the_interval_of_one_value_is_that_value_and_gaps_leave_the_mean() -> None:
    assert estimate([[0.5, 0.5, None]]) == {"value": 50.0, "low": 50.0, "high": 50.0}
    assert estimate([[None, None]]) is None


def test_problems_without_a_graded_sample_have_no_value() -> None:
    marks = Marks(correct=[3, 0], graded=[6, 0], majority=[1.0, 0.0])
    assert problem_values(marks, 12) == {"avg": [0.5, None], "maj": [1.0, None], "pass": [1.0, None]}


def test_hostile_text_stays_inside_the_data(tmp_path: Path) -> None:
    clean, folder = write_run(tmp_path / "clean"), write_run(tmp_path / "hostile", name=HOSTILE)
    rows = (folder / "tokens.jsonl").read_text().replace('" +"', json.dumps(HOSTILE))
    assert HOSTILE in rows
    (folder / "tokens.jsonl").write_text(rows)
    page = build_page([folder])
    assert _Parsed(page).elements == _Parsed(build_page([clean])).elements
    assert HOSTILE not in page
    data = data_of(page)
    assert data["runs"][0]["name"] == HOSTILE
    assert any(HOSTILE in row["tokens"] for row in data["runs"][0]["tokens"])


def test_a_placeholder_in_the_data_is_text(tmp_path: Path) -> None:
    assert data_of(build_page([write_run(tmp_path / "run", name="{{script}}")]))["runs"][0]["name"] == "{{script}}"


def test_the_page_loads_nothing_and_admits_no_other_script(tmp_path: Path) -> None:
    page = build_page([write_run(tmp_path / "demo")])
    allowed = {"http://www.w3.org/2000/svg"}
    assert set(re.findall(r"https?://[^\"'\s)]+", page)) <= allowed
    assert not re.search(r"@import|url\(|\bimport\s|\bfetch\(|innerHTML|document\.write|eval\(", page)
    loads = [(tag, name, value) for tag, got in _Parsed(page).elements for name, value in got.items()]
    assert [found for found in loads if found[1] in ("src", "href") and not str(found[2]).startswith("#")] == [
        ("link", "href", "data:,")
    ]
    (policy,) = [got["content"] for _, got in _Parsed(page).elements if "http-equiv" in got]
    assert policy is not None and "default-src 'none'" in policy and "unsafe" not in policy


def test_runs_of_an_arm_are_its_seeds(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"{arm}{seed}", arm, seed) for arm in ("refsol", "grpo") for seed in (0, 1)]
    data = page_data(folders)
    assert data["arms"] == ["refsol", "grpo"]
    kinds = [(row["kind"], row["arm"], row["seeds"]) for row in data["results"]]
    of_arm = [[("arm", arm, [0, 1]), ("seed", arm, [0]), ("seed", arm, [1])] for arm in (0, 1)]
    assert kinds == [("base", None, [0, 1]), ("chance", None, []), *of_arm[0], *of_arm[1]]
    mean, *seeds = (row["avg"]["value"] for row in data["results"][2:5])
    assert mean == pytest.approx(sum(seeds) / 2, abs=1e-3)
    assert [curve["label"] for curve in data["curves"]] == ["refsol", "grpo"]


def test_a_curve_has_the_steps_that_every_seed_was_scored_at(tmp_path: Path) -> None:
    whole, cut = (write_run(tmp_path / f"scoped-{seed}", seed=seed, steps=30) for seed in (0, 1))
    report = report_of(cut)
    for figures in (report["arms"]["stepalign_scoped"]["validation"], report["by_problem"]["validation"]):
        del figures["20"]
    (cut / "report.json").write_text(json.dumps(report))
    (curve,) = data_of(build_page([whole, cut]))["curves"]
    assert curve["steps"] == [0, 10, 30] and len(curve["avg"]) == 3


def test_runs_with_unequal_updates_are_other_rows_and_said_to_differ(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / str(steps), "grpo", steps=steps) for steps in (20, 40)]
    data = page_data(folders)
    assert data["arms"] == ["grpo, 20 updates", "grpo, 40 updates"]
    assert data["warnings"] == ["steps: 20, 40"]


def test_a_seed_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, name=name) for name in ("first", "second")]
    with pytest.raises(ConfigError, match=r"same seed \(first, second\); leave one"):
        build_page(folders)


def test_runs_on_other_problems_are_refused(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a", name="a"), write_run(tmp_path / "b", "grpo", name="b")
    by_problem = report_of(second)["by_problem"]
    by_problem["ids"]["test"][0] = "another"
    with pytest.raises(ConfigError, match="runs 'a' and 'b' were evaluated on other problems"):
        build_page([first, edit_report(second, by_problem=by_problem)])


def test_a_folder_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no report\.json in it"):
        build_page([tmp_path])
    with pytest.raises(ConfigError, match="no run is given"):
        build_page([])


EVALUATED = {"by_problem", "base", "chance", "evaluation", "validation", "selected_step", "test"}
"""Keys that only the report of an evaluated run has."""


def test_a_run_without_evaluation_or_tokens_has_a_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "bare", tokens=False)
    report = {key: value for key, value in report_of(folder).items() if key not in EVALUATED}
    arm = {key: value for key, value in report["arms"]["stepalign_scoped"].items() if key not in EVALUATED}
    (folder / "report.json").write_text(json.dumps(report | {"arms": {"stepalign_scoped": arm}}))
    data = data_of(build_page([folder]))
    assert (data["results"], data["curves"], data["samples"], data["runs"][0]["tokens"]) == ([], [], None, [])
    assert data["runs"][0]["selected_step"] is None


def test_differences_are_rows_of_pairs(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo")
    expected = {"value": 5.0, "low": 1.0, "high": 9.0, "apart": True}
    metric = {"seeds": [0], "difference": 5.0, "lower": 1.0, "upper": 9.0, "apart_from_0": True}
    pairs = {"pairs": [{"a": "x", "b": "y", "headline": False, "metrics": {"avg": metric}}], "remarks": ["one seed"]}
    data = data_of(build_page([folder], pairs))
    row = {"a": "x", "b": "y", "seeds": [0]}
    assert data["differences"] == [row | {"headline": False, "metrics": {"avg": expected}}]
    assert data["remarks"] == ["one seed"]


def test_values_that_are_not_finite_do_not_break_the_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo")
    text = (folder / "tokens.jsonl").read_text()
    (folder / "tokens.jsonl").write_text(re.sub(r'"logprob": \[-[\d.e-]+', '"logprob": [-Infinity', text, count=1))
    assert data_of(build_page([folder]))["runs"][0]["tokens"][0]["logprob"][0] is None


def test_the_page_is_written_whole(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo")
    target = folder / "report.html"
    target.write_text(f"old {build_page([folder])}")
    assert write_page(target, [folder]) == target
    assert target.read_text(encoding="utf-8") == build_page([folder])
    assert not list(folder.glob("*.tmp"))
    with pytest.raises(ConfigError):
        write_page(target, [tmp_path])
    assert target.read_text(encoding="utf-8") == build_page([folder])


def test_every_script_and_style_is_in_the_page() -> None:
    assets = Path(__file__).parents[3] / "services/report/stepalign_report/page/assets"
    assert {path.name for path in assets.glob("*.js")} == set(SCRIPTS)
    assert {path.name for path in assets.glob("*.css")} == set(STYLES)


def test_a_rollout_that_could_not_be_graded_is_kept_apart(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo")
    text = (folder / "tokens.jsonl").read_text()
    (folder / "tokens.jsonl").write_text(re.sub(r'"correct": (true|false)', '"correct": null', text, count=1))
    assert data_of(build_page([folder]))["runs"][0]["tokens"][0]["correct"] is None


def test_terms_that_runs_do_not_share_are_named_but_not_the_critic_of_some(tmp_path: Path) -> None:
    asked, alone = (write_run(tmp_path / arm, arm) for arm in ("stepalign", "grpo"))

    def edit(folder: Path, **terms: Any) -> None:
        report = json.loads((folder / "report.json").read_text())
        report["terms"] |= terms
        (folder / "report.json").write_text(json.dumps(report))

    edit(asked, critic={"weights": "c"})
    assert page_data([asked, alone])["warnings"] == []
    edit(alone, critic={"weights": "d"}, batch=7)
    assert page_data([asked, alone])["warnings"] == ["batch: 32, 7", "critic.weights: c, d"]
