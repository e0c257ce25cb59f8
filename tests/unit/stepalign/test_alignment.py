"""The alignment validator: what is accepted as which case, and each typed refusal."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepalign import Critique, CritiqueFailure, FailureReason, FinishReason, Verdict, parse_trace, validate_critique
from stepalign.critique.answers import Grader, answers_equal
from stepalign.graders.math import math_equal
from stepalign.types import StepStatus
from stepalign_lab.checker import exact_critique
from stepalign_lab.documents import synthetic_attempt
from stepalign_lab.domain import sample_chain

STEPS = ["3 + 4 = 7", "7 * 2 = 14", "14 - 5 = 9"]


def attempt(*bodies: str, answer: str | None = "9") -> str:
    text = "".join(f"<step_{i}>{body}</step_{i}>" for i, body in enumerate(bodies, start=1))
    return text + (f"<answer>{answer}</answer>" if answer is not None else "")


def critic(*steps: tuple[str, str], answer: str | None = "9", verdict: str) -> str:
    text = "".join(f"<step_{i}>{body}</step_{i}><{mark}/>" for i, (body, mark) in enumerate(steps, start=1))
    return text + (f"<answer>{answer}</answer>" if answer is not None else "") + f"<verdict>{verdict}</verdict>"


def copied(*bodies: str) -> list[tuple[str, str]]:
    return [(body, "copied") for body in bodies]


def accepted(text: str, of: str, known: str | None = "9") -> Critique:
    result = validate_critique(text, of, known_answer=known)
    assert isinstance(result, Critique), result
    return result


def refused(text: str, of: str, known: str | None = "9") -> FailureReason:
    result = validate_critique(text, of, known_answer=known)
    assert isinstance(result, CritiqueFailure), result
    assert result.text == text
    return result.reason


def test_case_a_copies_every_step() -> None:
    critique = accepted(critic(*copied(*STEPS), verdict="correct"), attempt(*STEPS))
    assert critique.verdict is Verdict.CORRECT
    assert critique.first_error_step is None and critique.alignment.first_difference is None
    assert critique.text == attempt(*STEPS)


def test_case_b_inserts_the_missing_step_and_shifts_the_rest() -> None:
    of = attempt(STEPS[0], STEPS[2])
    critique = accepted(
        critic((STEPS[0], "copied"), (STEPS[1], "inserted"), (STEPS[2], "copied"), verdict="unjustified"), of
    )
    assert critique.verdict is Verdict.UNJUSTIFIED
    assert [step.status for step in critique.steps] == ["copied", "inserted", "copied"]
    assert [step.attempt_step for step in critique.steps] == [1, None, 2]
    assert critique.first_error_step == 2
    difference = critique.alignment.first_difference
    assert difference is not None and of[slice(*difference)] == f"<step_2>{STEPS[2]}</step_2>"


def test_case_c_continues_the_unfinished_step() -> None:
    of = attempt(STEPS[0], answer=None) + "<step_2>7 * 2"
    critique = accepted(
        critic((STEPS[0], "copied"), (STEPS[1], "continued"), (STEPS[2], "continued"), verdict="incomplete"), of
    )
    assert critique.verdict is Verdict.INCOMPLETE
    assert critique.first_error_step is None
    difference = critique.alignment.first_difference
    assert difference is not None and of[slice(*difference)] == "<step_2>7 * 2"


def test_case_d_corrects_the_first_wrong_step() -> None:
    of = attempt(STEPS[0], "7 * 2 = 15", "15 - 5 = 10", answer="10")
    critique = accepted(
        critic((STEPS[0], "copied"), (STEPS[1], "corrected"), (STEPS[2], "continued"), verdict="incorrect"), of
    )
    assert critique.verdict is Verdict.INCORRECT
    assert critique.first_error_step == 2 and not critique.answer_is_wrong
    difference = critique.alignment.first_difference
    assert difference is not None and of[slice(*difference)] == "<step_2>7 * 2 = 15</step_2>"


def test_case_d_with_only_the_answer_wrong() -> None:
    of = attempt(*STEPS, answer="8")
    critique = accepted(critic(*copied(*STEPS), verdict="incorrect"), of)
    assert critique.answer_is_wrong and critique.first_error_step is None
    difference = critique.alignment.first_difference
    assert difference is not None and of[slice(*difference)] == "<answer>8</answer>"


def test_case_d_with_a_step_too_many() -> None:
    of = attempt(*STEPS, "9 + 1 = 10", answer="10")
    critique = accepted(critic(*copied(*STEPS), verdict="incorrect"), of)
    assert critique.first_error_step == 4


def test_whitespace_alone_is_accepted_and_counted() -> None:
    of = attempt("3 + 4  = 7", *STEPS[1:])
    critique = accepted(critic(*copied(*STEPS), verdict="correct"), of)
    assert critique.alignment.whitespace_differences == 1
    assert critique.text.startswith("<step_1>3 + 4 = 7</step_1>"), "the critic's own text, never the attempt's"


@given(st.integers(0, 2), st.data())
def test_one_changed_character_in_a_copied_step_is_refused(step: int, data: st.DataObject) -> None:
    position = data.draw(st.sampled_from([i for i, c in enumerate(STEPS[step]) if c != " "]))
    character = data.draw(st.sampled_from("0123456789x"))
    altered = list(STEPS)
    altered[step] = STEPS[step][:position] + character + STEPS[step][position + 1 :]
    outcome = validate_critique(critic(*copied(*altered), verdict="correct"), attempt(*STEPS), known_answer="9")
    if altered == STEPS:
        assert isinstance(outcome, Critique)
    else:
        assert isinstance(outcome, CritiqueFailure) and outcome.reason is FailureReason.COPIED_STEP_ALTERED


WRONG = attempt(STEPS[0], "7 * 2 = 15", "15 - 5 = 10", answer="10")
RIGHT = attempt(*STEPS)
CUT = attempt(STEPS[0], answer=None) + "<step_2>7 * 2"


@pytest.mark.parametrize(
    ("text", "of", "reason"),
    [
        ("", RIGHT, "unparseable"),
        ("The steps 1 to 3 are right.", RIGHT, "unparseable"),
        (attempt(*STEPS), RIGHT, "unparseable"),
        (critic(*copied(*STEPS), verdict="fine"), RIGHT, "unparseable"),
        ("Sure! " + critic(*copied(*STEPS), verdict="correct"), RIGHT, "unparseable"),
        (critic(*copied(*STEPS), verdict="correct") + " Done.", RIGHT, "unparseable"),
        (
            critic(*copied(STEPS[0]), (STEPS[1], "inserted"), (STEPS[2], "copied"), verdict="correct"),
            RIGHT,
            "step_count_mismatch",
        ),
        (critic(*copied(STEPS[0]), (STEPS[1], "continued"), verdict="incorrect"), WRONG, "unparseable"),
        (critic(*copied(*STEPS[:2]), verdict="correct"), RIGHT, "step_count_mismatch"),
        (critic(*copied(*STEPS, "9 = 9"), verdict="correct"), RIGHT, "step_count_mismatch"),
        (critic((STEPS[1], "continued"), verdict="incomplete"), CUT, "step_count_mismatch"),
        (critic(*copied(STEPS[0]), verdict="incomplete"), CUT, "step_count_mismatch"),
        (critic(*copied(STEPS[0]), ("7 + 2 = 9", "continued"), verdict="incomplete"), CUT, "copied_step_altered"),
        (critic(*copied("3 + 4 = 8"), (STEPS[1], "corrected"), verdict="incorrect"), WRONG, "copied_step_altered"),
        (critic(*copied(STEPS[0]), ("7 * 2 = 15", "corrected"), verdict="incorrect"), WRONG, "wrong_step_quoted"),
        (
            critic(*copied(STEPS[0]), ("7 * 2 = 15, no, 7 * 2 = 14", "corrected"), verdict="incorrect"),
            WRONG,
            "wrong_step_quoted",
        ),
        (critic(*copied(STEPS[0]), (STEPS[1], "corrected"), answer=None, verdict="incorrect"), WRONG, "no_answer"),
        (critic(*copied(STEPS[0]), (STEPS[1], "corrected"), answer="7", verdict="incorrect"), WRONG, "answer_mismatch"),
        (
            critic(*copied(STEPS[0], "7 * 2 = 15", "15 - 5 = 10"), answer="10", verdict="correct"),
            WRONG,
            "verdict_disagrees",
        ),
        (critic(*copied(*STEPS), verdict="incorrect"), RIGHT, "verdict_disagrees"),
        (critic(*copied(*STEPS), verdict="incomplete"), RIGHT, "verdict_disagrees"),
        (critic(*copied(STEPS[0]), verdict="correct"), CUT, "verdict_disagrees"),
        (
            critic(*copied(STEPS[0], STEPS[1]), (STEPS[2], "inserted"), verdict="unjustified"),
            WRONG,
            "verdict_disagrees",
        ),
    ],
)
def test_each_failure_has_its_typed_reason(text: str, of: str, reason: str) -> None:
    assert refused(text, of) == reason


@pytest.mark.parametrize("verdict", ["incorrect", "incomplete"])
def test_a_critique_that_omits_the_steps_is_refused(verdict: str) -> None:
    """The failing form "steps 1 to k are right": no copies, no anchor."""
    for of in (WRONG, CUT, "The answer is ten.", "<answer>10</answer>"):
        assert isinstance(validate_critique(critic(verdict=verdict), of, known_answer="9"), CritiqueFailure)
    assert refused(critic(verdict="incorrect"), WRONG) == "step_count_mismatch"
    assert refused(critic(verdict="incomplete"), "The answer is ten.") == "step_count_mismatch"
    assert refused(critic(*copied(STEPS[0]), verdict="incorrect"), WRONG) == "step_count_mismatch"


@pytest.mark.parametrize(
    "body",
    [
        "7 * 2 = 15 no, 14",
        '"7 * 2 = 15" is wrong, rather 7 * 2 = 14',
        "7 * 2 = 15. No: 7 * 2 = 14",
        "7 * 2 = 15 wrong",
        "7*2=15 wrong",
        "(7 * 2 = 15) it is 14",
    ],
)
def test_a_quotation_of_the_wrong_step_is_refused(body: str) -> None:
    text = critic((STEPS[0], "copied"), (body, "corrected"), (STEPS[2], "continued"), verdict="incorrect")
    assert refused(text, WRONG) == "wrong_step_quoted"


def test_a_copied_step_under_another_number_is_refused() -> None:
    text = critic(*copied(*STEPS), verdict="correct").replace("step_3", "step_4")
    assert isinstance(validate_critique(text, RIGHT, known_answer="9"), CritiqueFailure)
    renumbered = RIGHT.replace("step_3", "step_4")
    assert refused(critic(*copied(*STEPS), verdict="correct"), renumbered) == "copied_step_altered"


def test_a_mark_inside_a_step_stays_in_the_context() -> None:
    of = attempt("write <copied/> here", answer="9")
    assert accepted(critic(*copied("write <copied/> here"), verdict="correct"), of).text == of


def test_a_critic_that_ran_out_of_tokens_is_truncated() -> None:
    text = critic(*copied(*STEPS), verdict="correct")
    result = validate_critique(text, RIGHT, known_answer="9", critic_finish_reason=FinishReason.LENGTH)
    assert isinstance(result, CritiqueFailure) and result.reason is FailureReason.TRUNCATED


def test_without_a_known_answer_the_alignment_is_checked_all_the_same() -> None:
    assert accepted(critic(*copied(*STEPS), verdict="correct"), RIGHT, known=None).answer == "9"
    assert (
        refused(critic(*copied("3 + 4 = 8", *STEPS[1:]), verdict="correct"), RIGHT, known=None) == "copied_step_altered"
    )


def test_a_step_wrong_by_a_missing_word_may_be_completed() -> None:
    of = attempt(STEPS[0], "7 * 2 =", "14 - 5 = 9")
    text = critic((STEPS[0], "copied"), (STEPS[1], "corrected"), (STEPS[2], "continued"), verdict="incorrect")
    assert accepted(text, of).first_error_step == 2


def test_exact_critiques_of_all_kinds_of_attempts_validate() -> None:
    rng = random.Random(7)
    outcomes: dict[str, int] = {}
    for _ in range(2000):
        chain = sample_chain(rng)
        of = synthetic_attempt(chain, rng)
        result = validate_critique(exact_critique(chain.question, of), of, known_answer=str(chain.results()[-1]))
        name = result.verdict if isinstance(result, Critique) else result.reason
        outcomes[name] = outcomes.get(name, 0) + 1
        if isinstance(result, Critique):
            bodies = [step.body for step in parse_trace(of).steps]
            for step in result.steps:
                if step.status is StepStatus.COPIED:
                    assert step.attempt_step is not None and step.body == bodies[step.attempt_step - 1]
    assert {"correct", "unjustified", "incomplete", "incorrect"} <= outcomes.keys()
    # A tag in the middle of a corrupted step can make its words a "quotation"; nothing else is refused.
    assert outcomes.keys() <= {"correct", "unjustified", "incomplete", "incorrect", "wrong_step_quoted"}
    assert outcomes.get("wrong_step_quoted", 0) <= 5


def unsure(answer: str, known_answer: str) -> bool | None:
    """Cannot tell of answers with a question mark, not even of the same ones."""
    return None if "?" in answer + known_answer else answer == known_answer


def outcome(text: str, of: str, known: str | None, grader: Grader = unsure) -> str:
    result = validate_critique(text, of, known_answer=known, grader=grader)
    return result.verdict.value if isinstance(result, Critique) else result.reason.value


UNSURE = attempt(*STEPS, answer="9?")
CORRECTED = critic(*copied(STEPS[0]), (STEPS[1], "corrected"), verdict="incorrect")


@pytest.mark.parametrize(
    ("text", "of", "known", "expected"),
    [
        # An attempt's answer that may or may not be right contradicts no verdict.
        (critic(*copied(*STEPS), verdict="correct"), UNSURE, "9", "correct"),
        (critic(*copied(*STEPS), ("so 9", "inserted"), verdict="unjustified"), UNSURE, "9", "unjustified"),
        (critic(*copied(*STEPS), verdict="incorrect"), UNSURE, "9", "incorrect"),
        # The critique's own has to be right, and to be known to be so.
        (critic(*copied(*STEPS), answer="9?", verdict="correct"), RIGHT, "9", "answer_unknown"),
        (CORRECTED.replace("<answer>9", "<answer>9?"), WRONG, "9", "answer_unknown"),
        (critic(*copied(*STEPS), verdict="correct"), RIGHT, "9?", "answer_unknown"),
        # The same words are equal, whatever the grader makes of them.
        (critic(*copied(*STEPS), answer=" 9?", verdict="correct"), UNSURE, "9?", "correct"),
        (critic(*copied(*STEPS), answer="9?", verdict="incorrect"), UNSURE, "9?", "verdict_disagrees"),
        # What is known decides as ever.
        (critic(*copied(*STEPS), answer="8", verdict="incorrect"), UNSURE, "9", "answer_mismatch"),
        (critic(*copied(*STEPS), verdict="incorrect"), RIGHT, "9", "verdict_disagrees"),
        # Without a known answer the critique that calls the attempt right must give its answer.
        (critic(*copied(*STEPS), answer="9?", verdict="correct"), UNSURE, None, "correct"),
        (critic(*copied(*STEPS), verdict="correct"), UNSURE, None, "answer_unknown"),
        (critic(*copied(*STEPS), verdict="incorrect"), UNSURE, None, "incorrect"),
    ],
)  # fmt: skip
def test_an_unknown_equality_narrows_nothing_and_proves_nothing(
    text: str, of: str, known: str | None, expected: str
) -> None:
    assert outcome(text, of, known) == expected


def test_a_grader_that_fails_does_not_know() -> None:
    def broken(answer: str, known_answer: str) -> bool:
        raise RuntimeError("no such answer")

    assert outcome(critic(*copied(*STEPS), verdict="correct"), RIGHT, "9", broken) == "correct"
    assert outcome(critic(*copied(*STEPS), answer="9.0", verdict="correct"), RIGHT, "9", broken) == "answer_unknown"


def test_the_grader_says_which_answers_are_the_same() -> None:
    text = critic(*copied(*STEPS), verdict="correct")
    written = attempt(*STEPS, answer=r"\frac{18}{2}")
    assert outcome(text, written, "9", answers_equal) == "verdict_disagrees"
    assert outcome(text, written, "9", math_equal) == "correct"
    named = critic(*copied(*STEPS), answer="x = 9", verdict="correct")
    assert outcome(named, RIGHT, "9", math_equal) == "correct"
    assert (
        outcome(critic(*copied(*STEPS), answer="8", verdict="correct"), written, "9", math_equal) == "verdict_disagrees"
    )
