"""The guards of a run: each alarm at its limit and beyond it, and the same after a restart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from stepalign_run.config import AlarmsSection
from stepalign_trainer.alarms import Alarms

Run = Any  # that of conftest.py
CALM: dict[str, Any] = {
    "entropy": 1.0,
    "mean_tokens": 30.0,
    "truncated": 0.0,
    "grad_norm": 1.0,
    "signal_share": 0.5,
    "first_token_kl": 0.1,
}


def alarms_of(rows: list[dict[str, Any]], **settings: Any) -> list[list[str]]:
    alarms = Alarms(AlarmsSection(window=2, **settings), max_grad_norm=1.0)
    return [alarms.check(CALM | row) for row in rows]


@pytest.mark.parametrize(
    ("alarm", "figure", "limit", "beyond"),
    [
        ("entropy", "entropy", 10.0, 10.1),
        ("entropy", "entropy", 0.1, 0.099),
        ("length", "mean_tokens", 60.0, 60.1),
        ("length", "mean_tokens", 15.0, 14.9),
        ("grad_norm", "grad_norm", 10.0, 10.1),
        ("truncated", "truncated", 0.5, 0.51),
        ("no_signal", "signal_share", 0.001, 0.0009),
        ("no_signal", "signal_share", 0.001, None),
        ("first_token_kl", "first_token_kl", 5.0, 5.1),
    ],
)
def test_an_alarm_rises_beyond_its_limit_not_at_it(alarm: str, figure: str, limit: float, beyond: float | None) -> None:
    assert alarms_of([{}, {}, {figure: limit}, {figure: limit}]) == [[]] * 4
    assert alarms_of([{}, {}, {figure: beyond}, {figure: beyond}])[-1] == [alarm]


def test_a_gradient_that_shrinks_raises_nothing() -> None:
    assert alarms_of([{}, {}, {"grad_norm": 1e-9}, {"grad_norm": 0.0}]) == [[]] * 4


def test_what_stays_below_a_floor_is_not_compared() -> None:
    """Gradients that are hardly clipped, and the entropy of a model that is always sure, however much they grow."""
    for figure, small, quiet, loud in (("grad_norm", 1e-4, 10.0, 10.1), ("entropy", 1e-4, 0.5, 0.51)):
        start = [{figure: small}, {figure: small}]
        assert alarms_of([*start, {figure: quiet}, {figure: quiet}]) == [[]] * 4
        assert alarms_of([*start, {figure: loud}, {figure: loud}])[-1] == [figure]
    assert alarms_of([{"entropy": 0.4}, {"entropy": 0.4}, {"entropy": 1e-4}, {"entropy": 1e-4}])[-1] == []


def test_means_of_the_window_are_watched_and_compared_with_the_first() -> None:
    # First window: (20 + 40) / 2 = 30. Then (40 + 70) / 2 = 55, (70 + 51) / 2 = 60.5, (51 + 30) / 2.
    lengths = [20.0, 40.0, 70.0, 51.0, 30.0]
    assert alarms_of([{"mean_tokens": n} for n in lengths]) == [[], [], [], ["length"], []]


def test_nothing_is_said_before_the_first_window_is_full() -> None:
    bad = {"truncated": 1.0, "first_token_kl": 9.0, "signal_share": 0.0}
    assert alarms_of([bad, bad]) == [[], ["first_token_kl", "no_signal", "truncated"]]


def test_rows_without_a_figure_leave_its_mean() -> None:
    nothing = {"entropy": None, "first_token_kl": None}
    assert alarms_of([{}, {}, nothing, nothing]) == [[]] * 4
    assert alarms_of([{}, {}, nothing, {"entropy": 11.0}])[-1] == ["entropy"]


def test_a_resumed_run_raises_the_alarms_of_the_uninterrupted_one(make_run: Callable[..., Run]) -> None:
    """Completions of 30 tokens on average, then of 11: the mean over two updates tells from the third one on."""
    options = ("--alarms.window", "2", "--alarms.length_factor", "1.4")
    whole, run = make_run("--run.name", "whole", *options), make_run("--run.name", "resumed", *options)
    batches = [["right"] * 4, ["wrong_step"] * 4, ["early_answer"] * 4, ["early_answer"] * 4]
    for one in (whole, run):
        for version, names in enumerate(batches[:3]):
            one.publish(version, names)
    run.train("--trainer.steps", "3")
    whole.publish(3, batches[3])
    whole.train("--trainer.steps", "4")
    run.publish(3, batches[3])
    resumed = run.train("--trainer.steps", "4")
    alarms = [row["alarms"] for row in whole.rows()]
    assert ["length" in names for names in alarms] == [False, False, True, True]
    assert [row["alarms"] for row in run.rows()] == alarms
    assert resumed.alarms.max_grad_norm == resumed.config.trainer.max_grad_norm
    for rows, expected in ((resumed.alarms.first, (1, 2)), (resumed.alarms.last, (3, 4))):
        assert tuple(row["step"] for row in rows) == expected
