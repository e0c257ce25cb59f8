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


def test_the_order_of_problems_does_not_depend_on_the_group_size() -> None:
    """Four problems an update, once each or four times each."""
    singles = ProblemSchedule(problems(7), batch=4, seed=3)
    groups = ProblemSchedule(problems(7), batch=16, seed=3, group_size=4)
    for step in range(6):
        assert ids(groups, step) == [name for name in ids(singles, step) for _ in range(4)]


def test_a_group_is_one_problem_with_samples_of_its_own() -> None:
    draws = ProblemSchedule(problems(5), batch=24, seed=0, group_size=8).draws(2)
    assert len(draws) == 24
    for start in (0, 8, 16):
        group = draws[start : start + 8]
        assert len({(draw.problem.id, draw.group) for draw in group}) == 1
    assert len({(draw.problem.id, draw.sample) for draw in draws}) == 24


def test_a_problem_that_comes_twice_in_a_batch_makes_two_groups() -> None:
    draws = ProblemSchedule(problems(2), batch=12, seed=0, group_size=4).draws(0)
    groups = Counter((draw.problem.id, draw.group) for draw in draws)
    assert sorted(groups.values()) == [4, 4, 4]
    twice = next(name for name, group in groups if group == 1)
    assert [(d.sample, d.group) for d in draws if d.problem.id == twice] == [
        *((sample, 0) for sample in range(4)),
        *((sample, 1) for sample in range(4, 8)),
    ]
