"""Equality of answers, and Avg@k, Maj@k, Pass@k against values worked out by hand."""

import itertools

import pytest

from stepalign import FinishReason
from stepalign.grading import answer_key, answers_equal
from stepalign.scoring import GradedSample, grade, majority_share, pass_at_k, score


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        ("14", "14", True),
        ("14", "14.0", True),
        ("$1,200", "1200", True),
        ("1/2", "0.50", True),
        ("-3", "3", False),
        ("1,2", "12", False),
        ("3,4,5", "345", False),
        ("14", "15", False),
        ("Blue  sky", "blue sky", True),
        ("", "0", False),
        ("1/0", "1", False),
    ],
)
def test_answers_are_compared_as_numbers_else_as_text(left: str, right: str, equal: bool) -> None:
    assert answers_equal(left, right) is equal
    assert (answer_key(left) == answer_key(right)) is equal


def sample(answer: str | None, correct: bool = False) -> GradedSample:
    return GradedSample(answer=answer, correct=correct, well_formed=answer is not None, tokens=10)


@pytest.mark.parametrize(("n", "correct", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 3), (12, 1, 12)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int, correct: int, k: int) -> None:
    subsets = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_pass_at_k_refuses_too_few_samples() -> None:
    with pytest.raises(ValueError, match="at least k samples"):
        pass_at_k(3, 1, 4)


@pytest.mark.parametrize(
    ("votes", "share"),
    [
        ([sample("7", True), sample("7.0", True), sample("8")], 1.0),
        ([sample("7", True), sample("8"), sample("8")], 0.0),
        ([sample("7", True), sample("8")], 0.5),
        ([sample("7", True), sample(None), sample(None)], 1.0),
        ([sample(None), sample(None)], 0.0),
    ],
)
def test_majority_votes_by_equivalence_with_shared_ties(votes: list[GradedSample], share: float) -> None:
    assert majority_share(votes) == share


def test_scores_are_percentages_over_problems() -> None:
    result = score([[sample("1", True), sample("2")], [sample("2"), sample("2")]], truncated=1)
    assert (result.avg, result.maj, result.pass_, result.truncated) == (25.0, 25.0, 50.0, 25.0)
    assert result.as_report()["avg_at_2"] == 25.0


def test_ragged_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="same number of samples"):
        score([[sample("1")], []])


def test_a_right_answer_counts_only_with_eos() -> None:
    text = "<step_1>a</step_1><answer>4</answer>"
    assert grade(text, 9, FinishReason.STOP, "4").correct
    assert grade("<step_1>a</step_1><answer> </answer>", 9, FinishReason.STOP, "4").answer is None
    cut = grade(text, 9, FinishReason.LENGTH, "4")
    assert not cut.correct and not cut.well_formed and cut.answer == "4"
