"""Known attempts, and when a critic tells right steps from wrong ones."""

from __future__ import annotations

import math

import pytest

from stepalign.critique.trace import parse_trace
from stepalign.prompts import prompt_sets
from stepalign_critic.known_attempts import known_pairs, separates, separation

RIGHT = [0.2, 0.1, 0.3, 0.2, 0.15, 0.1, 0.25, 0.2]


def test_a_critic_that_finds_wrong_steps_likelier_wrong_separates() -> None:
    assert separates(RIGHT, [p + 0.1 for p in RIGHT])
    assert separates([0.0] * 8, [1.0] * 8)
    assert not separates(RIGHT, RIGHT)
    assert not separates(RIGHT, [p / 2 for p in RIGHT])


def test_a_difference_that_chance_may_make_is_none() -> None:
    assert not separates(
        RIGHT, [p + d for p, d in zip(RIGHT, [0.3, -0.08, 0.3, -0.1, 0.2, -0.05, 0.02, -0.1], strict=True)]
    )


def test_the_statistic_is_students() -> None:
    odds = [math.log(p / (1 - p)) for p in RIGHT]
    wrong = [1 / (1 + math.exp(-value - shift)) for value, shift in zip(odds, [1, 2, 1, 2, 1, 2, 1, 2], strict=True)]
    # Mean 1.5, standard deviation 0.5345 over eight.
    assert separation(RIGHT, wrong) == pytest.approx(1.5 / (0.53452 / math.sqrt(8)), rel=1e-4)


@pytest.mark.parametrize("version", [name for name in prompt_sets() if known_pairs(name)])
def test_the_pairs_of_a_set_differ_at_their_step_and_stand_in_the_grammar(version: str) -> None:
    pairs = known_pairs(version)
    assert len(pairs) == 8 and len({pair.question for pair in pairs}) == 8
    for pair in pairs:
        right, wrong = (parse_trace(text).steps for text in (pair.right, pair.wrong))
        assert len(right) == len(wrong)
        differing = [i for i, (a, b) in enumerate(zip(right, wrong, strict=True), start=1) if a.body != b.body]
        assert differing[0] == pair.step


def test_every_set_for_chat_models_and_the_labs_has_pairs() -> None:
    assert {name for name in prompt_sets() if known_pairs(name)} >= {"chat-v1", "chat-v2", "lab-v1"}
