"""Equality of answers, and Avg@k, Maj@k, Pass@k against values worked out by hand."""

import itertools

import pytest

from stepalign import FinishReason
from stepalign.critique.answers import answers_equal, equal_classes
from stepalign.critique.trace import parse_trace
from stepalign.errors import ConfigError, GraderError
from stepalign.scoring import (
    GradedSample,
    Score,
    chance,
    grade,
    is_right,
    majority_share,
    pass_at_k,
    score,
    trace_critique,
)
from stepalign.types import Problem, Verdict
from stepalign_lab.checker import exact_critique

FOUR = Problem(id="p", question="What is 2 + 2?", answer="4")
CHAIN = Problem(id="chain", question="3 + 4 * 7", answer="9")


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
    assert (len(equal_classes([left, right], answers_equal)) == 1) is equal


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


NEAR = {frozenset(pair) for pair in (("a", "b"), ("b", "c"), ("7", "seven"), ("7.0", "7"))}


def near(answer: str, known_answer: str) -> bool | None:
    """Equal to its neighbours, which is not transitive; unknown with a question mark; broken on an exclamation mark."""
    if "!" in answer + known_answer:
        raise RuntimeError("cannot compare")
    return None if "?" in answer + known_answer else answer == known_answer or {answer, known_answer} in NEAR


@pytest.mark.parametrize(
    ("answers", "classes"),
    [
        (["7", "seven", "8", "7"], [{"7", "seven"}, {"8"}]),
        # c is near b, which is no first member: an answer is compared with first members alone.
        (["a", "b", "c"], [{"a", "b"}, {"c"}]),
        (["b", "a", "c"], [{"a", "b", "c"}]),
        (["7", "7?", "7?", "7!"], [{"7"}, {"7?"}, {"7!"}]),
        ([], []),
    ],
)
def test_every_answer_is_in_the_class_of_the_first_one_that_it_equals(
    answers: list[str], classes: list[set[str]]
) -> None:
    assert equal_classes(answers, near) == classes


@pytest.mark.parametrize(
    ("votes", "share"),
    [
        ([sample("7", True), sample("seven", True), sample("8"), sample("8"), sample("9")], 0.5),
        ([sample("7", True), sample("seven", True), sample("7.0", True), sample("8"), sample("8")], 1.0),
        # Right answers are one class, whatever the grader says of two of them: seven is not near 7.0.
        ([sample("8"), sample("seven", True), sample("7.0", True)], 1.0),
        # Wrong ones are many: of five, no two are known to be equal.
        ([sample("7", True), sample("7", True), sample("5?"), sample("6?"), sample("8?")], 1.0),
        # Without an end it is wrong, and yet a vote for the right class.
        ([sample("7", True), sample("seven"), sample("8"), sample("8")], 0.5),
    ],
)
def test_votes_are_counted_by_classes_of_equal_answers(votes: list[GradedSample], share: float) -> None:
    assert majority_share(votes, near) == share
    assert score([votes], grader=near).maj == 100 * share


def test_an_evaluation_compares_distinct_answers_alone() -> None:
    """60 problems of 12 samples with three different answers each, one of them right."""
    asked: list[tuple[str, str]] = []

    def counting(answer: str, known_answer: str) -> bool:
        asked.append((answer, known_answer))
        return answer == known_answer

    samples = [[sample("1", True), sample("2"), sample("3")] * 4 for _ in range(60)]
    assert score(samples, grader=counting).maj == pytest.approx(100 / 3)
    assert len(asked) == 60 * 3


def test_scores_are_percentages_over_problems() -> None:
    result = score([[sample("1", True), sample("2")], [sample("2"), sample("2")]], truncated=1)
    assert (result.avg, result.maj, result.pass_, result.truncated) == (25.0, 25.0, 50.0, 25.0)
    assert result.as_report()["avg_at_2"] == 25.0


def test_ragged_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="same number of samples"):
        score([[sample("1")], []])


def test_a_right_answer_counts_only_with_eos() -> None:
    text = "<step_1>a</step_1><answer>4</answer>"
    assert grade(text, 9, FinishReason.STOP, FOUR).correct
    assert grade("<step_1>a</step_1><answer> </answer>", 9, FinishReason.STOP, FOUR).answer is None
    cut = grade(text, 9, FinishReason.LENGTH, FOUR)
    assert not cut.correct and not cut.well_formed and cut.answer == "4"


def broken_on_seven(answer: str, known_answer: str) -> bool:
    if answer == "7":
        raise RuntimeError("no sevens")
    return answers_equal(answer, known_answer)


def graded(answer: str) -> GradedSample:
    return grade(f"<step_1>a</step_1><answer>{answer}</answer>", 9, FinishReason.STOP, FOUR, broken_on_seven)


def test_what_a_grader_raises_is_one_error_that_names_the_answer() -> None:
    with pytest.raises(GraderError, match="failed on '7': RuntimeError: no sevens"):
        is_right(parse_trace("<answer>7</answer>"), FinishReason.STOP, FOUR, broken_on_seven)


def test_a_grader_that_cannot_tell_is_an_error_unless_the_words_are_the_same() -> None:
    def unsure(answer: str, known_answer: str) -> None:
        return None

    with pytest.raises(GraderError, match="cannot tell whether '7' is '4'"):
        is_right(parse_trace("<answer>7</answer>"), FinishReason.STOP, FOUR, unsure)
    assert is_right(parse_trace("<answer> 4 </answer>"), FinishReason.STOP, FOUR, unsure)
    assert grade("<step_1>a</step_1><answer>7</answer>", 9, FinishReason.STOP, FOUR, unsure).correct is None
    with pytest.raises(GraderError) as failed:
        is_right(parse_trace(f"<answer>{'7' * 100_000}</answer>"), FinishReason.STOP, FOUR, unsure)
    assert len(str(failed.value)) < 500


def test_without_eos_an_answer_is_right_only_where_no_end_is_asked_for() -> None:
    trace = parse_trace("<answer>4</answer>")
    assert is_right(trace, FinishReason.STOP, FOUR)
    assert not is_right(trace, FinishReason.LENGTH, FOUR)
    assert is_right(trace, FinishReason.LENGTH, FOUR, needs_eos=False)
    assert not is_right(parse_trace("<answer> </answer>"), FinishReason.STOP, FOUR, needs_eos=False)


def test_a_sample_that_the_grader_failed_on_is_neither_right_nor_wrong() -> None:
    assert graded("7").correct is None
    assert graded("4").correct is True and graded("5").correct is False


def test_a_grader_is_not_asked_about_a_solution_without_answer_or_end() -> None:
    text = "<step_1>a</step_1><answer>7</answer>"
    assert grade(text, 9, FinishReason.LENGTH, FOUR, broken_on_seven).correct is False
    assert grade("<step_1>a</step_1>", 9, FinishReason.STOP, FOUR, broken_on_seven).correct is False


def test_a_grader_error_leaves_the_figures_and_the_votes() -> None:
    """Of the first problem 2 of 3 are graded, of the second none."""
    result = score([[graded("4"), graded("5"), graded("7")], [graded("7")] * 3])
    assert (result.avg, result.maj, result.pass_, result.grader_errors) == (50.0, 50.0, 100.0, 4)
    assert result.by_problem.correct == [1, 0] and result.by_problem.graded == [2, 0]
    # Counted as wrong it would be 1/6; counted as a vote, 7 would win.
    sevens = score([[graded("4"), graded("7"), graded("7")]])
    assert (sevens.avg, sevens.maj) == (100.0, 100.0)
    assert sevens.as_report()["grader_errors"] == 2


def test_nothing_graded_is_nothing_right() -> None:
    result = score([[graded("7")]])
    assert (result.avg, result.maj, result.pass_, result.grader_errors) == (0.0, 0.0, 0.0, 1)


RIGHT = "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 9 </step_2> <answer> 9 </answer>"


@pytest.mark.parametrize(
    ("text", "correct", "every_step"),
    [
        (RIGHT, True, True),
        (RIGHT.replace("= 9", "= 8"), True, False),  # a wrong step, and yet the right answer
        ("<step_1> 7 * 7 = 9 </step_1> <answer> 9 </answer>", True, False),  # a step left out
        (RIGHT.replace("<answer> 9", "<answer> 8"), False, False),
    ],
)
def test_a_right_trace_is_a_right_answer_of_right_steps(text: str, correct: bool, every_step: bool) -> None:
    sample = grade(text, 9, FinishReason.STOP, CHAIN, checker=exact_critique)
    assert (sample.correct, sample.trace_correct) == (correct, every_step)
    assert grade(text, 9, FinishReason.STOP, CHAIN).trace_correct is None
    cut = grade(text, 9, FinishReason.LENGTH, CHAIN, checker=exact_critique)
    assert (cut.correct, cut.trace_correct) == (False, False)


def test_a_checker_that_cannot_handle_a_problem_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"data\.checker cannot handle problem 'p'"):
        trace_critique(FOUR, "<answer>4</answer>", exact_critique)


def test_a_critique_of_the_checker_that_does_not_validate_is_no_critique() -> None:
    critique = trace_critique(CHAIN, RIGHT, exact_critique)
    assert critique is not None and critique.verdict is Verdict.CORRECT

    def unfounded(question: str, attempt: str) -> str:
        return "<answer> 9 </answer> <verdict> correct </verdict>"

    assert trace_critique(CHAIN, RIGHT, unfounded) is None
    assert grade(RIGHT, 9, FinishReason.STOP, CHAIN, checker=unfounded).trace_correct is False


def checked(answer: str, correct: bool | None, every_step: bool) -> GradedSample:
    return GradedSample(answer, correct, well_formed=True, tokens=10, trace_correct=every_step)


SAMPLES = [
    [checked("9", True, True), checked("9", True, False), checked("8", False, False)],
    [checked("9", True, True), checked("8", False, False), checked("7", None, False)],  # a tie, and one not graded
    [checked("8", False, False), checked("7", False, False), checked("6", False, False)],
    [checked("7", None, False), checked("7", None, False), checked("7", None, False)],  # nothing graded
]


def figures_from_by_problem(result: Score) -> dict[str, float]:
    """What a reader of the report works out from it."""
    report = result.by_problem.as_report()
    rows = zip(report["correct"], report["graded"], report["majority"], report["trace_correct"], strict=True)
    kept = [row for row in rows if row[1]]
    share = 100 / len(kept)
    return {
        "avg_at_3": share * sum(correct / n for correct, n, _, _ in kept),
        "maj_at_3": share * sum(majority for _, _, majority, _ in kept),
        "pass_at_3": share * sum(correct > 0 for correct, _, _, _ in kept),
        "trace_at_3": share * sum(traces / n for _, n, _, traces in kept),
    }


def test_the_figures_of_each_problem_give_the_figures_of_all() -> None:
    result = score(SAMPLES)
    assert result.by_problem.as_report() == {
        "correct": [2, 1, 0, 0],
        "graded": [3, 2, 3, 0],
        "majority": [1.0, 0.5, 0.0, 0.0],
        "trace_correct": [1, 1, 0, 0],
    }
    report = result.as_report()
    by_hand = {
        "avg_at_3": 100 * (2 / 3 + 1 / 2 + 0) / 3,
        "maj_at_3": 100 * (1 + 1 / 2 + 0) / 3,
        "pass_at_3": 100 * 2 / 3,
        "trace_at_3": 100 * (1 / 3 + 1 / 2 + 0) / 3,
    }
    assert {key: report[key] for key in by_hand} == pytest.approx(by_hand, abs=1e-4)
    assert figures_from_by_problem(result) == pytest.approx(by_hand)
    assert report["grader_errors"] == 4


def test_without_a_checker_there_are_no_figures_of_traces() -> None:
    result = score([[sample("1", True)]])
    assert result.trace is None and result.by_problem.trace_correct is None
    assert "trace_at_1" not in result.as_report()


def test_a_guesser_among_ten_answers_gets_10_percent_and_72_of_12_tries() -> None:
    assert {key: round(value, 2) for key, value in chance(10, 12).items()} == {
        "avg_at_12": 10.0,
        "maj_at_12": 10.0,
        "pass_at_12": 71.76,  # 1 − 0.9¹² = 0.71757
    }
    assert chance(2, 1) == {"avg_at_1": 50.0, "maj_at_1": 50.0, "pass_at_1": 50.0}
