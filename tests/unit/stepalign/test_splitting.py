"""Attempts: which rule applies, what the steps are, and that spans point into what was sent."""

from __future__ import annotations

import re

import pytest

from stepalign.critique.splitting import AnswerRule, SplitAttempt, SplitRule, join_steps, split_attempt
from stepalign.critique.trace import parse_trace

GSM = "There are 3 bags of 4 apples.\nThat is 3 * 4 = 12 apples.\n#### 12"

CASES: dict[str, tuple[str, SplitRule, list[str], str | None, AnswerRule | None]] = {
    "tags stay": (
        "<step_1>a</step_1> <answer>4</answer>",
        SplitRule.TAGS,
        ["<step_1>a</step_1>"],
        "<answer>4</answer>",
        AnswerRule.TAG,
    ),
    "a closer of nothing is no tag": ("1. a\n2. b </step_2>", SplitRule.NUMBERED_LINES, ["a", "b"], None, None),
    "numbers with stops": (
        "1. Add.\n2. Halve: 7.\n3. So 7",
        SplitRule.NUMBERED_LINES,
        ["Add.", "Halve: 7.", "So 7"],
        None,
        None,
    ),
    "numbers with brackets over several lines": (
        "1) 3 + 4\n   = 7\n2) 7 * 2 = 14",
        SplitRule.NUMBERED_LINES,
        ["3 + 4\n   = 7", "7 * 2 = 14"],
        None,
        None,
    ),
    "words with numbers": (
        "Let us see.\nStep 1: 3 + 4 = 7\n**Step 2:** 7 * 2 = 14\nAnswer: 14",
        SplitRule.NUMBERED_LINES,
        ["Let us see.\nStep 1: 3 + 4 = 7", "7 * 2 = 14\nAnswer: 14"],
        "14",
        AnswerRule.PHRASE,
    ),
    "headings with numbers": (
        "### Step 1\nAdd: 7\n### Step 2\nDouble: 14",
        SplitRule.NUMBERED_LINES,
        ["Add: 7", "Double: 14"],
        None,
        None,
    ),
    "one number is no list": ("1. only this\nand that", SplitRule.LINES, ["1. only this", "and that"], None, None),
    "a gap in the numbers is no list": ("1. a\n3. b", SplitRule.LINES, ["1. a", "3. b"], None, None),
    "a gap after two good numbers is no list": (
        "1. a\n2. b\n4. c",
        SplitRule.LINES,
        ["1. a", "2. b", "4. c"],
        None,
        None,
    ),
    "paragraphs": (
        "First we add.\nIt is 7.\n\n \nThen 14.",
        SplitRule.PARAGRAPHS,
        ["First we add.\nIt is 7.", "Then 14."],
        None,
        None,
    ),
    "lines, and an answer of its own line": (
        GSM,
        SplitRule.LINES,
        ["There are 3 bags of 4 apples.", "That is 3 * 4 = 12 apples."],
        "12",
        AnswerRule.HASHES,
    ),
    "sentences": (
        "It costs 3.50 dollars, e.g. for two. Then 7! So the answer is 7.",
        SplitRule.SENTENCES,
        ["It costs 3.50 dollars, e.g. for two.", "Then 7!"],
        "7",
        AnswerRule.PHRASE,
    ),
    "one sentence": ("just this", SplitRule.SENTENCES, ["just this"], None, None),
    "nothing": (" \n\n ", SplitRule.SENTENCES, [], None, None),
    "the last box wins, with braces inside": (
        r"First \boxed{3}. Then $x = \boxed{\frac{1}{2}}$.",
        SplitRule.SENTENCES,
        [r"First \boxed{3}.", r"Then $x = \boxed{\frac{1}{2}}$."],
        r"\frac{1}{2}",
        AnswerRule.BOXED,
    ),
    "a box that never closes is none": (r"So \boxed{3", SplitRule.SENTENCES, [r"So \boxed{3"], None, None),
    "a paragraph that says the answer": (
        "We add: 7.\n\nThe final answer is: $\\boxed{7}$.",
        SplitRule.PARAGRAPHS,
        ["We add: 7.", "The final answer is: $\\boxed{7}$."],
        "7",
        AnswerRule.BOXED,
    ),
    "a paragraph that only marks the answer": (
        "We add: 7.\n\n**Final Answer:** $\\boxed{7}$",
        SplitRule.PARAGRAPHS,
        ["We add: 7."],
        "7",
        AnswerRule.BOXED,
    ),
    "a sentence that says more than the answer stays a step": (
        "We add 3 and 4. Since 3 + 4 = 7 the answer is 7.",
        SplitRule.SENTENCES,
        ["We add 3 and 4.", "Since 3 + 4 = 7 the answer is 7."],
        "7",
        AnswerRule.PHRASE,
    ),
}


def pieces(split: SplitAttempt) -> list[str]:
    return [split.text[slice(*span)] for span in split.steps]


@pytest.mark.parametrize("case", CASES)
def test_each_rule_splits_as_it_says(case: str) -> None:
    text, rule, steps, answer, answer_rule = CASES[case]
    split = split_attempt(text)
    assert (split.rule, pieces(split)) == (rule, steps)
    assert (None if split.answer is None else text[slice(*split.answer)], split.answer_rule) == (answer, answer_rule)


@pytest.mark.parametrize("case", CASES)
def test_the_tagged_text_holds_the_same_steps_and_spans_lead_back(case: str) -> None:
    split = split_attempt(CASES[case][0])
    trace = parse_trace(split.tagged)
    whole = [step.span for step in trace.steps]
    assert [split.span_in_text(span) for span in whole] == list(split.steps)
    if split.rule is not SplitRule.TAGS:
        assert [step.body for step in trace.steps] == pieces(split)
        assert [step.number for step in trace.steps] == list(range(1, len(whole) + 1))
    if split.answer is not None:
        assert trace.answer is not None
        assert split.span_in_text(trace.answer.span) == split.answer
    with pytest.raises(ValueError, match="no step or answer"):
        split.span_in_text((10_000, 10_001))


def test_spans_count_code_points() -> None:
    split = split_attempt("1. 𝑥 = 3 😀\n2. 𝑥² = 9")
    assert pieces(split) == ["𝑥 = 3 😀", "𝑥² = 9"]


def test_steps_that_were_sent_one_by_one_are_joined_by_line_breaks() -> None:
    split = join_steps(["3 + 4 = 7", " 7 * 2 = 14\nand done", "#### 14"])
    assert split.rule is SplitRule.STEPS
    assert split.text == "3 + 4 = 7\n 7 * 2 = 14\nand done\n#### 14"
    assert pieces(split) == ["3 + 4 = 7", "7 * 2 = 14\nand done", "#### 14"]
    assert split.answer is not None and split.text[slice(*split.answer)] == "14"
    assert split.tagged == (
        "<step_1>3 + 4 = 7</step_1>\n<step_2>7 * 2 = 14\nand done</step_2>\n<step_3>#### 14</step_3>\n"
        "<answer>14</answer>"
    )


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["a", " "], "step 2 is blank"),
        (["<step_1>a"], "step 1 holds a step"),
        (["a", "<STEP 1>b"], "step 2 holds a step"),
        (["<st\u200bep_1>a"], "step 1 holds a step"),
    ],
)
def test_steps_that_cannot_be_steps_are_refused(steps: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        join_steps(steps)
