"""The benchmark of real critics, its rows given: which are asked again, what a peer called, and the figures of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import bench_critic_quality as bench
from benchmarks.critic_quality import cells
from benchmarks.critic_quality.cells import NEITHER, Cell, judged_rows, measure_cell, of_half
from benchmarks.critic_quality.critic_prompt import is_asked, made_of, messages, predicted
from benchmarks.critic_quality.rows import BenchRows, read_rows
from benchmarks.errors import BenchError
from stepalign_run.data import LabelledData, LabelledSolution, load_labelled

MADE_OF = {"model": "m", "data_sha256": "0"}


def solution(number: int, first_error: int | None, stated: str) -> dict[str, Any]:
    return {
        "id": str(number),
        "question": f"3, 4 and 1? ({number})",
        "steps": ["He has 3 + 4 = 7.", "With 1 more it is 7 + 1.", f"So the answer is {stated}."],
        "first_error": first_error,
        "reference_solution": "3 + 4 = 7, and 7 + 1 = 8.",
        "answer": "8",
    }


@pytest.fixture
def data(tmp_path: Path) -> LabelledData:
    """Solutions whose first error is, by turns, step 1 and none."""
    rows = [solution(i, 1 if i % 2 else None, "9" if i % 2 else "8") for i in range(60)]
    path = tmp_path / "processbench_gsm8k_dev.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_labelled(str(path))


def row(solution: LabelledSolution, at: int | None) -> dict[str, Any]:
    return {
        "id": solution.id,
        "called": at,
        "failure": None if at is not None else "no_number",
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "seconds": 1.0,
        "probabilities": [],
    }


def test_rows_are_kept_and_a_cut_one_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    with BenchRows(path, MADE_OF) as rows:
        rows.append({"id": "a", "called": 1})
        rows.append({"id": "b", "called": 2})
    path.write_text(path.read_text()[:-5])
    assert set(read_rows(path, MADE_OF)) == {"a"}
    with BenchRows(path, MADE_OF) as rows:
        assert set(rows.rows) == {"a"}
        rows.append({"id": "b", "called": 3})
    assert read_rows(path, MADE_OF)["b"]["called"] == 3


@pytest.mark.parametrize("left", ["", '{"model": "m"'])
def test_a_file_that_a_kill_has_left_without_a_row_is_begun_anew(left: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(left)
    assert read_rows(path, MADE_OF) == {}
    with BenchRows(path, MADE_OF) as rows:
        rows.append({"id": "a"})
    assert set(read_rows(path, MADE_OF)) == {"a"}


def test_rows_of_something_else_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    BenchRows(path, MADE_OF).append({"id": "a"})
    for use in (BenchRows, read_rows):
        with pytest.raises(BenchError, match="another data_sha256"):
            use(path, MADE_OF | {"data_sha256": "1"})


def test_a_finished_cell_starts_no_critic(data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: str) -> None:
        raise BenchError("a critic was started")

    monkeypatch.setattr(cells, "ROWS", tmp_path)
    monkeypatch.setattr(cells, "serving_critic", refused)
    cell = Cell("random", "transformers", NEITHER, limit=3)
    assert cell.name == "random-transformers-chat-v2-no-reference-no-answer"
    with BenchRows(cell.path, cell.made_of(data)) as rows:
        for each in cell.chosen(data)[:2]:
            rows.append(row(each, -1))
    with pytest.raises(BenchError, match="1 of 3 rows are missing"):
        judged_rows(cell, data)
    with pytest.raises(BenchError, match="a critic was started"):
        measure_cell(cell, data, bench._console)
    with BenchRows(cell.path, cell.made_of(data)) as rows:
        rows.append(row(cell.chosen(data)[2], 1))
    measure_cell(cell, data, bench._console)
    assert [one.called for one in judged_rows(cell, data)] == [-1, -1, 1]
    told = Cell("random", "transformers", limit=3)
    assert told.made_of(data) != cell.made_of(data)
    assert {each.first_error for each in Cell("random", "transformers", erroneous=True).chosen(data)} == {1}


def test_the_peer_is_told_what_the_critic_is_told(data: LabelledData) -> None:
    wrong, right = data.solutions[1], data.solutions[0]
    (asked,) = messages(wrong, told=False)
    (told,) = messages(wrong, told=True)
    for shown in (asked, told):
        assert (
            "7 + 1 = 8." in shown["content"]
            and "<paragraph_2>\nSo the answer is 9.\n</paragraph_2>" in shown["content"]
        )
    assert "The correct final answer is 8." in told["content"] and "correct final" not in asked["content"]
    assert "state -1" in asked["content"] and "-1" not in told["content"]
    assert is_asked(wrong) and not is_asked(right)


def test_where_the_variants_of_the_peer_place_the_error(data: LabelledData) -> None:
    wrong = data.solutions[1]
    answer = {"critique": r"\boxed{0}? No: \boxed{ 2}.", "log_probabilities": [-3.0, -0.5, -2.0]}
    assert predicted(wrong, None, "written") == predicted(wrong, None, "told_likeliest") == {-1: 1.0}
    assert predicted(wrong, answer, "written") == predicted(wrong, answer, "told") == {2: 1.0}
    assert predicted(wrong, answer, "told_likeliest") == {1: 1.0}
    for nowhere in (r"\boxed{-1}", r"\boxed{3}", r"\boxed{x}", "Paragraph 2"):
        assert predicted(wrong, answer | {"critique": nowhere}, "told") == {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}


def peer_row(each: LabelledSolution, boxed: int, likeliest: int) -> dict[str, Any]:
    """The first error of all is step 1."""
    return {
        "id": each.id,
        "critique": rf"\boxed{{{boxed}}}",
        "log_probabilities": [0.0 if i == likeliest else -5.0 for i in range(3)],
    }


def test_figures_compare_with_the_best_variant_of_the_peer(
    data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "ROWS", tmp_path)
    monkeypatch.setattr(bench, "ROWS", tmp_path)
    for cell in (*bench.F1_CELLS, *bench.DEV_CELLS.values(), *bench.VALID_CELLS):
        with BenchRows(cell.path, cell.made_of(data)) as rows:
            for each in cell.chosen(data):
                is_right = each.first_error is None
                # On the dev half an error is surer than on the other, where half of the errors are not over 0.3.
                sure = 0.4 if cell.half == "dev" or int(each.id) % 4 == 1 else 0.2
                p_wrong = [[0.3, False]] if is_right else [[0.1, False], [sure, True]]
                rows.append(row(each, -1 if is_right else 1) | {"probabilities": p_wrong})
    for half in ("dev", "test"):
        for prompting in ("asked", "told", "at_once"):
            made = made_of(bench.MODEL, data, prompting)
            with BenchRows(bench._peer_path(half, prompting), made) as rows:
                for i, each in enumerate(bench._peer_asked(data, half)):
                    # Likeliest after "asked" is the right place, on the test half each second time. "told" writes it
                    # each third time.
                    likeliest = int(prompting == "asked" and (half == "dev" or i % 2 == 0))
                    rows.append(peer_row(each, int(prompting == "told" and i % 3 == 0), likeliest))
    figures = bench._figures(data)
    assert figures["peers"]["critic_prompt"]["variant"] == "written_likeliest"
    assert figures["peers"]["critic_prompt_as_written"]["variant"] == "told"
    assert figures["best_rule"] == "best_fixed_place"
    asked = [each for each in of_half(data, "test") if each.first_error is not None]
    share = -(-len(asked) // 2) / len(asked)
    assert figures["peers"]["critic_prompt"]["on_erroneous"]["value"] == pytest.approx(100 * share, abs=1e-3)
    assert figures["critics"][bench.MAIN.name]["f1"]["value"] == 100.0
    blind = next(cell for cell in bench.F1_CELLS if not cell.told.answer)
    at = figures["critics"][blind.name]["at_dev_threshold"]
    found = [each for each in blind.chosen(data) if each.first_error is not None]
    sure = sum(int(each.id) % 4 == 1 for each in found) / len(found)
    assert (at["threshold"], at["on_correct"]["value"]) == (0.39, 100.0)
    assert at["on_erroneous"]["value"] == pytest.approx(100 * sure, abs=1e-3)
    assert "at_dev_threshold" not in figures["critics"][bench.MAIN.name]
    assert figures["ratios"]["critic_prompt"]["value"] == pytest.approx((1 + share) / (2 * share), abs=1e-3)
    assert figures["ratios"]["answer_then_uniform"]["value"] == pytest.approx((1 + 1 / 3) / (2 / 3), abs=1e-3)
    speed = {
        "transformers": {"speedup": 3.0, "differing": 0, "batch_8": {"differing": 1}},
        "vllm": {"speedup": 2.0, "differing": 1},
    }
    bounds = bench._bounds(figures, speed)
    assert bounds["valid_share"].value == 1.0
    assert [name for name, bound in bounds.items() if not bound.kept] == [
        "speedup_vllm",
        "differing_transformers_batch_8",
    ]


def test_without_the_data_nothing_is_measured(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(bench.main)
    result = CliRunner().invoke(app, ["--data", str(tmp_path), "--output", str(tmp_path / "figures.json")])
    assert result.exit_code == 1
    assert "not measured: --data must name a folder that holds processbench_gsm8k_dev.jsonl" in " ".join(
        result.output.split()
    )
    assert not (tmp_path / "figures.json").exists()
