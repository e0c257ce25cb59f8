"""The figures of critic-quality, worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from stepalign import CriticIdentity, CritiqueResponse, join_steps, validate_critique
from stepalign.errors import ConfigError
from stepalign.types import AttemptReading, Critique, Usage
from stepalign_report.critic_quality.figures import (
    Sample,
    at_threshold,
    best_threshold,
    calibration,
    comparison_figures,
    critic_figures,
)
from stepalign_report.critic_quality.judged import Judged, judge
from stepalign_report.critic_quality.rows import Header, Row, RowsFile, Told
from stepalign_report.critic_quality.summary import Measured, read_summary, summarise, write_summary
from stepalign_report.critic_quality.tables import quality_tables
from stepalign_report.intervals import middle
from stepalign_run.data import LabelledData, LabelledSolution
from stepalign_run.folder.ownership import NotOursError

CRITIC = CriticIdentity(model="m", weights_revision="w", prompt_version="p", backend="b")
TOLD = Told(reference_solution=True, answer=True)


def one(number: int, label: int, called: int | None, **fields: Any) -> Judged:
    values: dict[str, Any] = {
        "id": str(number),
        "question": f"q{number}",
        "steps": 4,
        "generator": None,
        "label": label,
        "called": called,
        "failure": "unparseable" if called is None else None,
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "seconds": 1.0,
        **fields,
    }
    return Judged(**values)


def many(right_on_erroneous: int, erroneous: int, right_on_correct: int, correct: int) -> list[Judged]:
    wrong = [one(n, 1, 1 if n < right_on_erroneous else 2) for n in range(erroneous)]
    return wrong + [one(100 + n, -1, -1 if n < right_on_correct else 0) for n in range(correct)]


def test_f1_is_the_harmonic_mean_of_the_two_accuracies() -> None:
    figures = critic_figures(Sample(many(3, 4, 2, 8)))
    assert figures["on_erroneous"]["value"] == 75.0 and figures["on_correct"]["value"] == 25.0
    assert figures["f1"]["value"] == pytest.approx(2 * 75 * 25 / 100)
    assert (figures["detected"]["value"], figures["place_accuracy"]["value"]) == (100.0, 75.0)


def test_a_failure_is_wrong_in_both_accuracies_and_counted_by_reason() -> None:
    rows = [*many(4, 4, 8, 8), one(200, 0, None), one(201, -1, None, failure="truncated")]
    figures = critic_figures(Sample(rows))
    assert figures["on_erroneous"]["value"] == 80.0
    assert figures["on_correct"]["value"] == pytest.approx(100 * 8 / 9, abs=1e-4)
    assert figures["failures"] == {"truncated": 1, "unparseable": 1}
    assert figures["valid"]["value"] == pytest.approx(100 * 12 / 14, abs=1e-4)
    # Of an error that was not called the place is neither right nor wrong.
    assert figures["place_accuracy"]["value"] == 100.0


def test_a_critic_that_is_right_nowhere_has_an_f1_of_0_and_one_kind_alone_has_none() -> None:
    assert critic_figures(Sample(many(0, 3, 0, 3)))["f1"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert critic_figures(Sample(many(2, 3, 0, 0)))["f1"] is None


def test_tokens_and_seconds_are_means_over_the_answers() -> None:
    refused = one(1, -1, None, prompt_tokens=None, completion_tokens=None, seconds=4.0)
    figures = critic_figures(Sample([one(0, -1, -1, seconds=2.0), refused]))
    assert (figures["prompt_tokens"]["value"], figures["seconds"]["value"]) == (100.0, 3.0)


def test_groups_are_by_number_of_steps_and_by_author() -> None:
    rows = [one(0, 1, 1, steps=3, generator="a"), one(1, -1, -1, steps=4, generator="b"), one(2, -1, 0, steps=20)]
    figures = critic_figures(Sample(rows))
    assert [(group["name"], group["rows"]) for group in figures["by_steps"]] == [
        ("1–3", 1),
        ("4–5", 1),
        ("11 or more", 1),
    ]
    assert [group["name"] for group in figures["by_generator"]] == ["a", "b", "not named"]
    assert figures["by_generator"][0]["on_erroneous"]["value"] == 100.0
    assert figures["by_generator"][0]["on_correct"] is None and figures["by_generator"][2]["on_correct"]["value"] == 0.0


def test_solutions_of_one_question_are_drawn_together() -> None:
    single = many(10, 20, 10, 20)
    # Every solution three times: three times as many rows, and no more questions.
    thrice = [
        one(1000 * copy + int(row.id), row.label, row.called, question=row.question)
        for row in single
        for copy in range(3)
    ]
    apart = [one(1000 * copy + int(row.id), row.label, row.called) for row in single for copy in range(3)]
    of_single, of_thrice, of_apart = (critic_figures(Sample(rows)) for rows in (single, thrice, apart))
    assert of_thrice["questions"] == 40 and of_thrice["f1"] == of_single["f1"]
    width = {
        name: found["f1"]["high"] - found["f1"]["low"] for name, found in (("thrice", of_thrice), ("apart", of_apart))
    }
    assert width["apart"] < 0.75 * width["thrice"]


def test_an_interval_is_near_that_of_the_normal_distribution() -> None:
    figures = critic_figures(Sample(many(50, 100, 0, 0)))
    half = 1.96 * 100 * (0.25 / 100) ** 0.5
    assert figures["on_erroneous"]["low"] == pytest.approx(50 - half, abs=1)
    assert figures["on_erroneous"]["high"] == pytest.approx(50 + half, abs=1)


def test_calibration_is_worked_out_by_hand() -> None:
    rows = [
        one(0, 1, 1, probabilities=((0.1, False), (0.8, True))),
        one(1, -1, -1, probabilities=((0.1, False), (0.6, False))),
        one(2, -1, None),
    ]
    found = calibration(Sample(rows))
    assert found is not None and (found["solutions"], found["steps"]) == (2, 4)
    # Bins: two steps at 0.1 of which none is wrong, one at 0.6 that is right, one at 0.8 that is wrong.
    assert found["ece"]["value"] == pytest.approx((2 * 0.1 + 0.6 + 0.2) / 4)
    assert found["brier"]["value"] == pytest.approx((0.01 + 0.01 + 0.36 + 0.04) / 4)
    assert [bin["steps"] for bin in found["bins"]] == [0, 2, 0, 0, 0, 0, 1, 0, 1, 0]
    assert (found["bins"][1]["mean_p_wrong"], found["bins"][8]["share_wrong"]) == (0.1, 1.0)
    assert calibration(Sample([one(0, 1, 1)])) is None


def test_a_probability_of_1_is_in_the_last_bin() -> None:
    found = calibration(Sample([one(0, 0, 0, probabilities=((1.0, True),))]))
    assert found is not None and found["bins"][9]["steps"] == 1 and found["ece"]["value"] == 0.0


LESS_AND_LESS_SURE = [
    one(0, 1, -1, probabilities=((0.10, False), (0.35, True))),
    one(1, 0, -1, probabilities=((0.30, True),)),
    one(2, 1, -1, probabilities=((0.40, False), (0.90, True))),
    one(3, -1, -1, probabilities=((0.10, False), (0.25, False))),
    one(4, -1, -1, probabilities=((0.32, False),)),
    one(5, 0, None),
]


def test_the_best_threshold_is_worked_out_by_hand() -> None:
    """Over 0.25 to 0.29 two of four errors are found and one of two right ones is left alone; nowhere is more."""
    assert best_threshold(LESS_AND_LESS_SURE) == 0.29
    found = at_threshold(Sample(LESS_AND_LESS_SURE), 0.29)
    assert [found[name]["value"] for name in ("on_erroneous", "on_correct", "f1")] == [50.0, 50.0, 50.0]
    found = at_threshold(Sample(LESS_AND_LESS_SURE), 0.25)
    assert found["on_correct"]["value"] == 50.0, "0.25 itself is not over 0.25"
    assert at_threshold(Sample(LESS_AND_LESS_SURE), 0.24)["on_correct"]["value"] == 0.0
    found = at_threshold(Sample(LESS_AND_LESS_SURE), 0.6)
    assert [found[name]["value"] for name in ("on_erroneous", "on_correct")] == [25.0, 100.0]


def test_there_is_no_best_threshold_without_probabilities_or_with_one_kind_alone() -> None:
    assert best_threshold(many(1, 2, 1, 2)) is None
    assert best_threshold(LESS_AND_LESS_SURE[:3]) is None


def test_there_is_no_best_threshold_where_none_finds_an_error() -> None:
    never = [one(0, 1, -1, probabilities=((0.4, False), (0.1, True))), one(1, -1, -1, probabilities=((0.1, False),))]
    assert best_threshold(never) is None


def test_a_weak_model_has_a_threshold_below_a_hundredth() -> None:
    rows = [one(0, 0, -1, probabilities=((0.004, True),)), one(1, -1, -1, probabilities=((0.0015, False),))]
    assert best_threshold(rows) == 0.002


def test_two_critics_are_compared_pair_by_pair() -> None:
    a, b = many(60, 80, 60, 80), many(50, 80, 50, 80)
    found = comparison_figures(a, b)
    assert found["f1_difference"]["value"] == pytest.approx(12.5)
    assert found["f1_ratio"]["value"] == pytest.approx(75 / 62.5)
    # b is right only where a is: the difference is surer than two figures apart would make it.
    apart = critic_figures(Sample(a))["f1"]
    assert found["f1_difference"]["high"] - found["f1_difference"]["low"] < apart["high"] - apart["low"]
    assert found["f1_difference"]["low"] > 0 and found["f1_ratio"]["low"] > 1
    same = comparison_figures(a, a)
    assert same["f1_difference"] == {"value": 0.0, "low": 0.0, "high": 0.0} and same["f1_ratio"]["high"] == 1.0


def test_a_comparison_is_over_the_solutions_that_both_have_answered() -> None:
    a = many(3, 4, 4, 4)
    assert comparison_figures(a, a[1:])["rows"] == 7
    with pytest.raises(ValueError):
        comparison_figures(a[:1], a[1:])


def test_the_middle_leaves_resamples_without_a_figure_out() -> None:
    assert middle(np.array([np.nan, *np.arange(101.0)])) == pytest.approx((2.5, 97.5))
    with pytest.raises(ValueError):
        middle(np.array([np.nan]))


STEPS = ("3 + 4 = 7", "7 + 1 = 9", "Now the answer:", "#### 9")


def solution(
    steps: Sequence[str] = STEPS, first_error: int | None = None, question: str = "3 + 4 + 1?"
) -> LabelledSolution:
    return LabelledSolution(id="a", question=question, steps=tuple(steps), first_error=first_error)


def answered(critic_text: str, steps: Sequence[str] = STEPS, p_wrong: list[float] | None = None) -> Row:
    """The row of a critic that wrote this text."""
    split = join_steps(steps)
    outcome = validate_critique(critic_text, split.tagged)
    is_critique = isinstance(outcome, Critique)
    response = CritiqueResponse(
        id="crq_1",
        attempt=AttemptReading(
            rule=split.rule,
            steps=list(split.steps),
            answer=split.answer,
            answer_rule=split.answer_rule,
            tagged=split.tagged,
        ),
        critique=outcome if is_critique else None,
        failure=None if is_critique else outcome,
        context=outcome.text if is_critique else None,
        p_wrong=p_wrong,
        critic=CRITIC,
        usage=Usage(prompt_tokens=7, completion_tokens=3),
    )
    return Row(id="a", seconds=0.5, response=response)


def copied(count: int) -> str:
    bodies = [f"<step_{n}>{body}</step_{n}><copied/>" for n, body in enumerate(STEPS, start=1)]
    return "".join(bodies[:count])


@pytest.mark.parametrize(
    ("critic_text", "called"),
    [
        (copied(4) + "<answer>9</answer><verdict>correct</verdict>", -1),
        (copied(1) + "<step_2>7 + 1 = 8</step_2><corrected/><answer>8</answer><verdict>incorrect</verdict>", 1),
        # The answer alone: the step that states it.
        (copied(4) + "<answer>8</answer><verdict>incorrect</verdict>", 3),
        ("no critique at all", None),
    ],
)
def test_the_called_step_is_one_of_those_that_were_sent(critic_text: str, called: int | None) -> None:
    found = judge(solution(), answered(critic_text))
    assert found.called == called and (found.failure == "unparseable") == (called is None)
    assert (found.prompt_tokens, found.completion_tokens, found.seconds) == (7, 3, 0.5)


@pytest.mark.parametrize(
    ("first_error", "labels"),
    [
        (None, ((0.1, False), (0.7, False), (0.2, False), (0.3, False))),
        (1, ((0.1, False), (0.7, True))),
        (0, ((0.1, True),)),
        (3, ((0.1, False), (0.7, False), (0.2, False), (0.3, True))),
    ],
)
def test_steps_up_to_the_first_wrong_one_have_labels(first_error: int | None, labels: Any) -> None:
    row = answered("no critique at all", p_wrong=[0.1, 0.7, 0.2, 0.3])
    assert judge(solution(first_error=first_error), row).probabilities == labels


def test_a_kept_row_that_is_damaged_is_named_by_its_line(tmp_path: Path) -> None:
    header = Header(critic=CRITIC, data="d", data_sha256="0" * 64, told=TOLD)
    path = tmp_path / "rows.jsonl"
    with RowsFile(path, header) as rows:
        rows.append(answered("x"))
    with path.open("a") as file:
        file.write('{"id": 1}\n')
    with pytest.raises(ConfigError, match=r"line 3: .*remove the line, and it is asked again"):
        RowsFile(path, header)


def summary_of(p_wrong: list[float] | None = None) -> dict[str, Any]:
    data = LabelledData("d", ("stepalign",), (solution(first_error=1),), {"labelling ended with give_up": 2})
    row = answered(copied(4) + "<answer>9</answer><verdict>correct</verdict>", p_wrong=p_wrong)
    measured = Measured(CRITIC, TOLD, {"a": row})
    return summarise(data, data.solutions, [measured], half=None, limit=None)


def test_the_remarks_say_what_a_reader_must_know() -> None:
    assert summary_of()["remarks"] == [
        "left out of the data, 2: labelling ended with give_up",
        "there is no F1 without correct solutions",
    ]


def test_the_reliability_of_a_critic_with_probabilities_is_in_its_tables() -> None:
    console = Console(width=100, record=True)
    for table in quality_tables(summary_of([0.1, 0.7, 0.2, 0.3])):
        console.print(table)
    shown = console.export_text()
    assert "ECE of p_wrong" in shown and "reliability of p_wrong" in shown and "0.7–0.8" in shown


@pytest.mark.parametrize("knows_answers", [True, False])
def test_the_best_threshold_is_told_of_a_critic_that_knows_no_answers(knows_answers: bool) -> None:
    solutions = (solution(first_error=1), solution().model_copy(update={"id": "b"}))
    text = copied(4) + "<answer>9</answer><verdict>correct</verdict>"
    rows = {"a": answered(text, p_wrong=[0.1, 0.3, 0.1, 0.1]), "b": answered(text, p_wrong=[0.1] * 4)}
    told = Told(reference_solution=True, answer=knows_answers)
    data = LabelledData("d", ("stepalign",), solutions, {})
    summary = summarise(data, solutions, [Measured(CRITIC, told, rows)], half=None, limit=None)
    console = Console(width=100, record=True)
    for table in quality_tables(summary):
        console.print(table)
    shown = console.export_text()
    assert ("wrong_threshold" in shown) is not knows_answers
    if not knows_answers:
        assert "0.29" in shown and "100.0 (100.0 to 100.0)" in shown


def test_a_summary_is_replaced_by_the_next_and_no_other_file_is(tmp_path: Path) -> None:
    path = tmp_path / "critic_quality.json"
    for _ in range(2):
        write_summary(path, summary_of())
    assert read_summary(path) == summary_of() and read_summary(tmp_path / "none.json") is None
    path.write_text(json.dumps({"critics": []}))
    with pytest.raises(NotOursError):
        write_summary(path, summary_of())
    with pytest.raises(ConfigError, match="is no report of critic-quality"):
        read_summary(path)
