"""The plan of a critique: what the model's probabilities and the known answer make of an attempt.

The model is played by numbers: each test says how likely it finds each step wrong, and what it writes.
"""

from __future__ import annotations

import math

import pytest
from llguidance import LLMatcher
from unit.stepalign_critic.test_grammar import byte_tokens

from stepalign.critique.alignment import validate_critique
from stepalign.critique.splitting import split_attempt
from stepalign.critique.trace import parse_trace
from stepalign.prompts.layout import CritiqueLayout, load_layout
from stepalign.types import Critique, Forced, StepStatus, Verdict
from stepalign_critic.decoding.bounds import cut_by_tokens
from stepalign_critic.decoding.conversation import Conversation, TurnPrompts
from stepalign_critic.decoding.grammar import to_lark
from stepalign_critic.decoding.plan import Plan, Score
from stepalign_critic.errors import BudgetTooSmallError

STEPS = ["3 + 4 = 7", "7 * 2 = 15", "15 - 5 = 10"]
TAGGED = [f"<step_{i}>{step}</step_{i}>" for i, step in enumerate(STEPS, start=1)]
WRONG = "".join([*TAGGED, "<answer>10</answer>"])
CUT = "".join([*TAGGED[:2], "<step_3>15 -"])
VALUES = {"question": "3 + 4 * 2 - 5", "reference_solution": "14 - 5 = 9", "known": ""}
SETS = ["lab-v1", "chat-v1", "chat-v2"]


def plan_of(
    prompts: str,
    attempt: str = WRONG,
    known: str | None = "9",
    right: bool | None = False,
    *,
    trusts: bool = True,
    budget: int = 2000,
    threshold: float = 0.5,
) -> Plan:
    split, layout = split_attempt(attempt), load_layout(prompts)
    conversation = None
    if layout.form == "turns":
        steps = [step.body for step in parse_trace(split.tagged).steps]
        conversation = Conversation(TurnPrompts.load(prompts), layout, VALUES, steps)
    return Plan(
        split,
        layout,
        known_answer=known,
        answer_is_right=right,
        trusts_answers=trusts,
        budget=budget,
        threshold=threshold,
        conversation=conversation,
    )


def scores(plan: Plan, p_wrong: list[float]) -> list[Score]:
    """Scores that say these probabilities."""
    found: list[Score] = []
    told: set[int] = set()
    for piece in plan.pieces:
        if piece.step is None:
            continue
        p = p_wrong[piece.step]
        if piece.others:
            found.append(Score(math.log(1 - p), (math.log(p),)))
        else:
            found.append(Score(0.0 if piece.step in told else math.log(1 - p)))
        told.add(piece.step)
    return found


def critique(
    plan: Plan, p_wrong: list[float], written: str, attempt: str, known: str | None
) -> tuple[Critique, tuple[Forced, ...]]:
    """The validated critique when the model writes ``written``, which the grammar must allow."""
    choosing = plan.choose(scores(plan, p_wrong))
    assert choosing.p_wrong == pytest.approx(p_wrong)
    remainder = plan.remainder(choosing.place, len)
    if remainder.grammar is None:
        assert not written
    else:
        matcher = LLMatcher(byte_tokens(), LLMatcher.grammar_from_lark(to_lark(remainder.grammar)))
        assert matcher.try_consume_tokens(list(written.encode())) == len(written.encode()), (
            written,
            matcher.get_error(),
        )
        assert matcher.is_accepting(), written
    finished = plan.finish(choosing, remainder.open_text + written)
    found = validate_critique(finished.text, split_attempt(attempt).tagged, known_answer=known)
    assert isinstance(found, Critique), found
    return found, finished.forced


def marked(layout: CritiqueLayout, step: str, mark: str) -> str:
    after = layout.separator if layout.form == "turns" else f"{layout.before_mark}<{mark}/>{layout.separator}"
    return step + after


def answer(layout: CritiqueLayout, text: str) -> str:
    return f"<answer>{layout.inside}{text}{layout.inside}</answer>"


def statuses(found: Critique) -> list[tuple[str, str]]:
    return [(step.body.strip(), step.status.value) for step in found.steps]


@pytest.mark.parametrize("prompts", SETS)
def test_a_wrong_step_is_corrected_where_the_model_finds_it_likeliest(prompts: str) -> None:
    layout = load_layout(prompts)
    written = marked(layout, "7 * 2 = 14</step_2>", "corrected") + marked(
        layout, "<step_3>14 - 5 = 9</step_3>", "continued"
    )
    plan = plan_of(prompts)
    found, forced = critique(plan, [0.1, 0.4, 0.2], written + answer(layout, "9"), WRONG, "9")
    assert (found.verdict, found.first_error_step) == (Verdict.INCORRECT, 2)
    assert statuses(found) == [("3 + 4 = 7", "copied"), ("7 * 2 = 14", "corrected"), ("14 - 5 = 9", "continued")]
    # By itself the model would have found no error.
    assert forced == (Forced.ANSWER, Forced.ERROR)


@pytest.mark.parametrize("prompts", SETS)
def test_the_models_own_opinion_is_not_called_forced(prompts: str) -> None:
    layout = load_layout(prompts)
    written = marked(layout, "4 + 3 = 7</step_1>", "corrected") + answer(layout, "9")
    found, forced = critique(plan_of(prompts), [0.9, 0.4, 0.2], written, WRONG, "9")
    assert (found.first_error_step, forced) == (1, (Forced.ANSWER,))


def test_the_answer_alone_is_wrong_where_each_step_is_surely_right() -> None:
    found, forced = critique(plan_of("chat-v2"), [0.01, 0.005, 0.001], "", WRONG, "9")
    assert (found.verdict, found.first_error_step, found.answer_is_wrong) == (Verdict.INCORRECT, None, True)
    assert forced == (Forced.ANSWER, Forced.ERROR)


@pytest.mark.parametrize("prompts", SETS)
def test_a_right_answer_clears_the_steps(prompts: str) -> None:
    plan = plan_of(prompts, known="10", right=True)
    found, forced = critique(plan, [0.1, 0.9, 0.2], "", WRONG, "10")
    assert (found.verdict, forced) == (Verdict.CORRECT, (Forced.NO_ERROR,))
    assert {status for _, status in statuses(found)} == {"copied"}


def test_an_answer_that_is_not_trusted_clears_nothing() -> None:
    layout = load_layout("chat-v2")
    plan = plan_of("chat-v2", known="10", right=True, trusts=False)
    written = marked(layout, "7 * 2 = 14</step_2>", "corrected") + answer(layout, "10")
    found, forced = critique(plan, [0.1, 0.9, 0.2], written, WRONG, "10")
    assert (found.verdict, found.first_error_step, forced) == (Verdict.INCORRECT, 2, (Forced.ANSWER,))


def test_a_wrong_answer_that_is_not_trusted_is_wrong_all_the_same() -> None:
    plan = plan_of("chat-v2", trusts=False)
    found, forced = critique(plan, [0.1, 0.2, 0.2], "", WRONG, "9")
    assert (found.verdict, found.answer_is_wrong, found.answer) == (Verdict.INCORRECT, True, "9")
    assert forced == (Forced.ANSWER, Forced.ERROR)


@pytest.mark.parametrize("prompts", SETS)
def test_without_a_known_answer_the_first_step_that_is_rather_wrong_counts(prompts: str) -> None:
    layout = load_layout(prompts)
    plan = plan_of(prompts, known=None, right=None)
    written = marked(layout, "7 * 2 = 14</step_2>", "corrected") + answer(layout, "9")
    found, forced = critique(plan, [0.4, 0.6, 0.9], written, WRONG, None)
    assert (found.first_error_step, found.answer, forced) == (2, "9", ())
    found, forced = critique(plan_of(prompts, known=None, right=None), [0.4, 0.4, 0.4], "", WRONG, None)
    assert (found.verdict, found.answer, forced) == (Verdict.CORRECT, "10", ())


@pytest.mark.parametrize("prompts", SETS)
@pytest.mark.parametrize(("threshold", "place"), [(0.1, 1), (0.3, 2), (0.7, 3), (0.95, None)])
def test_without_a_known_answer_the_threshold_decides(prompts: str, threshold: float, place: int | None) -> None:
    plan = plan_of(prompts, known=None, right=None, threshold=threshold)
    choosing = plan.choose(scores(plan, [0.2, 0.6, 0.9]))
    assert (None if choosing.place is None else choosing.place.step + 1) == place


def test_the_step_that_states_a_wrong_answer_is_wrong_where_each_step_is_surely_right() -> None:
    plan = plan_of("chat-v2", attempt="3 + 4 = 7\n\n7 * 2 = 14\n\nThe answer is 15.")
    choosing = plan.choose(scores(plan, [0.01, 0.005, 0.001]))
    assert choosing.place is not None and choosing.place.step == len(plan.steps) - 1


@pytest.mark.parametrize("threshold", [0.1, 0.95])
def test_a_wrong_answer_leaves_nothing_to_the_threshold(threshold: float) -> None:
    plan = plan_of("chat-v2", threshold=threshold)
    choosing = plan.choose(scores(plan, [0.2, 0.6, 0.9]))
    assert choosing.place is not None and choosing.place.step == 2


@pytest.mark.parametrize("prompts", SETS)
def test_an_attempt_that_breaks_off_is_continued(prompts: str) -> None:
    layout = load_layout(prompts)
    plan = plan_of(prompts, CUT, right=None)
    written = marked(layout, " 6 = 9</step_3>", "continued") + answer(layout, "9")
    found, forced = critique(plan, [0.1, 0.2, 0.3], written, CUT, "9")
    assert (found.verdict, forced) == (Verdict.INCOMPLETE, (Forced.ANSWER,))
    assert statuses(found)[-1] == ("15 - 6 = 9", "continued")


@pytest.mark.parametrize("prompts", SETS)
def test_an_attempt_that_breaks_off_may_be_wrong_before(prompts: str) -> None:
    layout = load_layout(prompts)
    written = marked(layout, "7 * 2 = 14</step_2>", "corrected") + answer(layout, "9")
    found, _ = critique(plan_of(prompts, CUT, right=None), [0.1, 0.7, 0.3], written, CUT, "9")
    assert (found.verdict, found.first_error_step) == (Verdict.INCORRECT, 2)


@pytest.mark.parametrize("prompts", SETS)
@pytest.mark.parametrize(("attempt", "right"), [("", None), ("<answer>10</answer>", False)])
def test_an_attempt_without_steps_is_written_from_the_first(prompts: str, attempt: str, right: bool | None) -> None:
    layout = load_layout(prompts)
    mark = "continued" if right is None else "inserted"
    written = marked(layout, "14 - 5 = 9</step_1>", mark) + answer(layout, "9")
    found, _ = critique(plan_of(prompts, attempt, right=right), [], written, attempt, "9")
    assert statuses(found) == [("14 - 5 = 9", mark)]


def test_a_missing_step_is_inserted_and_nothing_after_it_is_written() -> None:
    layout = load_layout("lab-v1")
    plan = plan_of("lab-v1", known="10", right=True, trusts=False)
    written = "so 7 is there </step_2> <inserted/>"
    found, forced = critique(plan, [0.1, 0.9, 0.2], written, WRONG, "10")
    assert layout.form == "inline"
    assert (found.verdict, forced) == (Verdict.UNJUSTIFIED, ())
    assert [status for _, status in statuses(found)] == ["copied", "inserted", "copied", "copied"]
    assert [step.number for step in found.steps] == [1, 2, 3, 4]


def test_a_step_that_states_the_answer_is_not_copied_before_another_one() -> None:
    attempt = "First 3 + 4 = 7.\n\nThen the answer is \\boxed{10} as 7 + 3 = 10."
    plan = plan_of("chat-v2", attempt)
    choosing = plan.choose(scores(plan, [0.001] * len(plan.steps)))
    assert choosing.place is not None and choosing.place.step < len(plan.steps)


@pytest.mark.parametrize("prompts", SETS)
def test_a_budget_that_is_too_small_is_refused_before_anything_is_written(prompts: str) -> None:
    plan = plan_of(prompts, budget=40)
    choosing = plan.choose(scores(plan, [0.1, 0.9, 0.2]))
    with pytest.raises(BudgetTooSmallError, match=r"raise critic\.max_new_tokens"):
        plan.remainder(choosing.place, len)


@pytest.mark.parametrize("prompts", SETS)
@pytest.mark.parametrize("budget", [300, 500, 4000])
def test_the_longest_that_a_grammar_allows_fits_the_budget(prompts: str, budget: int) -> None:
    """Of a tokenizer of bytes: the grammar always takes the longest way."""
    plan = plan_of(prompts, budget=budget)
    choosing = plan.choose(scores(plan, [0.1, 0.9, 0.2]))
    remainder = plan.remainder(choosing.place, len)
    assert remainder.grammar is not None
    matcher = LLMatcher(byte_tokens(), LLMatcher.grammar_from_lark(to_lark(remainder.grammar)))
    taken, text = 0, b""
    while not matcher.is_stopped():
        forced = matcher.compute_ff_tokens()
        if not forced:
            forced = next(
                [each] for each in (ord("x"), ord("<"), ord("s"), *range(256)) if matcher.try_consume_tokens([each])
            )
        else:
            assert matcher.consume_tokens(forced)
        taken += len(forced)
        text += bytes(token for token in forced if token < 256)
    given = sum(len(piece.text) for piece in plan.pieces[: remainder.kept]) + sum(map(len, remainder.given))
    assert taken + given <= budget
    written = remainder.open_text + text.decode()
    finished = plan.finish(choosing, written, cut_by_tokens(written))
    found = validate_critique(finished.text, WRONG, known_answer="9")
    assert isinstance(found, Critique), found
    assert finished.forced == (Forced.ANSWER, Forced.STEP_BOUND)
    assert all(step.body.strip("x") == "" for step in found.steps[1:]), [step.body for step in found.steps]


def test_words_for_a_missing_step_may_be_had() -> None:
    layout = CritiqueLayout(form="check", unjustified=" unjustified")
    plan = Plan(split_attempt(WRONG), layout, known_answer="10", answer_is_right=True, trusts_answers=True, budget=2000)
    assert [piece.text for piece in plan.pieces[:3]] == ["Step 1:", " right", "\n"]
    told = [Score(-0.1, (-3.0, -4.0)), Score(-3.0, (-4.0, -0.1)), Score(-0.1, (-3.0, -4.0))]
    choosing = plan.choose(told)
    assert choosing.place is not None and choosing.place.kind is StepStatus.INSERTED
    remainder = plan.remainder(choosing.place, len)
    assert remainder.given == ("Step 2:", " unjustified", "\n", "<step_2>")
    finished = plan.finish(choosing, "<step_2>7 is there</step_2>")
    found = validate_critique(finished.text, WRONG, known_answer="10")
    assert isinstance(found, Critique) and found.verdict is Verdict.UNJUSTIFIED
