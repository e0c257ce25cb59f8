"""Which problem is sampled when."""

from __future__ import annotations

from collections import Counter

from stepalign.types import Problem
from stepalign_solver.schedule import ProblemSchedule


def problems(count: int) -> list[Problem]:
    return [Problem(id=f"p{i}", question="1 + 1", answer="2") for i in range(count)]


def ids(schedule: ProblemSchedule, step: int) -> list[str]:
    return [draw.problem.id for draw in schedule.draws(step)]


def test_every_problem_comes_once_an_epoch_whatever_the_batch() -> None:
    # 7 problems in batches of 3: epochs end inside batches; 21 draws are 3 epochs.
    schedule = ProblemSchedule(problems(7), batch=3, seed=0)
    order = [name for step in range(7) for name in ids(schedule, step)]
    epochs = [order[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == [f"p{i}" for i in range(7)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    schedule = ProblemSchedule(problems(7), batch=3, seed=5)
    forward = [ids(schedule, step) for step in range(6)]
    restarted = ProblemSchedule(list(reversed(problems(7))), batch=3, seed=5)
    assert [ids(restarted, step) for step in reversed(range(6))] == list(reversed(forward))
    assert [ids(ProblemSchedule(problems(7), batch=3, seed=6), step) for step in range(6)] != forward


def test_repeats_within_a_batch_get_different_sample_numbers() -> None:
    draws = ProblemSchedule(problems(2), batch=5, seed=0).draws(0)
    assert len({(draw.problem.id, draw.sample) for draw in draws}) == 5
    counts = Counter(draw.problem.id for draw in draws)
    assert sorted(counts.values()) == [2, 3]
    assert all({d.sample for d in draws if d.problem.id == name} == set(range(n)) for name, n in counts.items())


def test_sample_numbers_begin_anew_in_every_batch() -> None:
    schedule = ProblemSchedule(problems(4), batch=4, seed=0)
    assert [draw.sample for step in range(3) for draw in schedule.draws(step)] == [0] * 12
