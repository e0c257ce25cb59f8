"""Rules without a model, on rows worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.critic_quality.peers import expected_figures, main, peers, rules_of
from benchmarks.critic_quality.rules import (
    best_fixed_place,
    fixed,
    given_the_answer,
    same_answer,
    uniform,
    unseen_number,
)
from stepalign_run.data import LabelledSolution, in_half


def row(number: int, first_error: int | None, stated: str = "9", **fields: Any) -> LabelledSolution:
    steps = ("He has 3 + 4 = 7.", "With 1 more it is 7 + 1 = 9.", f"So the answer is {stated}.")
    values = {"reference_solution": "3 + 4 = 7, and 7 + 1 = 8.", "answer": "8", **fields}
    return LabelledSolution(
        id=str(number), question=f"3, 4 and 1? ({number})", steps=steps, first_error=first_error, **values
    )


def test_a_right_answer_means_no_error_and_a_wrong_one_any_step_alike() -> None:
    assert given_the_answer(row(0, None, "$8"), uniform) == {-1: 1.0}
    assert given_the_answer(row(0, 1), uniform) == {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}
    assert given_the_answer(row(0, 1, "8", answer=None), uniform)[0] == 1 / 3


@pytest.mark.parametrize(
    ("stated", "known", "same"),
    [
        (r"\$65,960", "65960", True),
        ("12 eggs", "12", True),
        ("12 of 13", "12", False),
        ("1/2", "0.5", True),
        ("x", "y", False),
    ],
)
def test_answers_are_the_same_with_units_and_currency(stated: str, known: str, same: bool) -> None:
    assert same_answer(stated, known) is same


def test_chance_is_computed_and_not_drawn() -> None:
    solutions = [row(0, 1), row(1, 0), row(2, None, "8"), row(3, None, "8"), row(4, 1, "8")]
    found = expected_figures(solutions, rules_of(solutions)["answer_then_uniform"])
    # Of the three erroneous ones two have a wrong answer, and one place of three is right.
    assert found["on_erroneous"] is not None and found["on_correct"] is not None and found["f1"] is not None
    assert found["on_erroneous"]["value"] == pytest.approx(100 * 2 / 9, abs=1e-4)
    assert found["on_correct"]["value"] == 100.0
    assert found["f1"]["value"] == pytest.approx(2 * 100 * (2 / 9) / (1 + 2 / 9), abs=1e-4)
    assert found["f1"] == expected_figures(solutions, rules_of(solutions)["answer_then_uniform"])["f1"]


def test_the_fixed_place_is_chosen_on_the_dev_half_and_read_on_the_other() -> None:
    every = [row(number, None) for number in range(40)]
    solutions = [row(int(one.id), 2 if in_half(one, "dev") else 0) for one in every]
    dev = [one for one in solutions if in_half(one, "dev")]
    assert best_fixed_place(dev) == 2
    figures = peers([*solutions, row(100, None, "8")], "dev")["best_fixed_place"]["on_erroneous"]
    assert figures is not None and figures["value"] == 100.0
    other = peers([*solutions, row(100, None, "8")], "test")["best_fixed_place"]["on_erroneous"]
    assert other is not None and other["value"] == 0.0


def test_a_place_from_the_end_stays_within_the_steps() -> None:
    assert (
        fixed(-1)(row(0, None)) == {2: 1.0}
        and fixed(-9)(row(0, None)) == {0: 1.0}
        and fixed(9)(row(0, None)) == {2: 1.0}
    )


def test_the_first_number_that_nobody_has_seen_is_the_error() -> None:
    assert unseen_number(row(0, 1)) == {1: 1.0}
    assert unseen_number(row(0, 1, reference_solution="7.0 and 9.00 and 8")) == {2: 1.0}
    assert unseen_number(row(0, 1, reference_solution=None)) == {0: 1.0}


def test_the_rules_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "labelled.jsonl"
    rows = [row(0, 1), row(1, None, "8")]
    path.write_text("".join(json.dumps(one.model_dump()) + "\n" for one in rows))
    from typer import Typer

    app = Typer()
    app.command()(main)
    shown = CliRunner().invoke(app, ["--data", str(path)], catch_exceptions=False, env={"COLUMNS": "100"}).output
    assert "first_unseen_number" in shown and "100.0 (100.0 to 100.0)" in shown
