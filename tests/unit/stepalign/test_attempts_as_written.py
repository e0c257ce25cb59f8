"""Attempts as models write them: tags put right, thinking, odd characters, headings, blocks, answers in any form."""

from __future__ import annotations

import pytest

from stepalign.critique.splitting import AnswerRule, SplitAttempt, SplitRule, join_steps, split_attempt
from stepalign.critique.trace import TraceIssue, parse_trace

REPAIRED, NUMBERED, PARAGRAPHS = SplitRule.REPAIRED_TAGS, SplitRule.NUMBERED_LINES, SplitRule.PARAGRAPHS
LINES, SENTENCES = SplitRule.LINES, SplitRule.SENTENCES

ATTEMPTS: dict[str, tuple[str, SplitRule, list[str], str | None]] = {
    # Tags.
    "no closers": (
        "<step_1>3 + 4 = 7\n<step_2>7 * 2 = 14\n<answer>14</answer>",
        REPAIRED,
        ["3 + 4 = 7", "7 * 2 = 14"],
        "14",
    ),
    "closers astray": (
        "</step_9><step_1>3 + 4</answer> = 7</step_1><step_2>14</step_2></step_2><answer>14</answer>",
        REPAIRED,
        ["3 + 4  = 7", "14"],
        "14",
    ),
    "no numbers": ("<step>3 + 4 = 7</step> <step>14</step> <answer>14</answer>", REPAIRED, ["3 + 4 = 7", "14"], "14"),
    "spaces": (
        "<step 1>3 + 4 = 7</step 1>\n< Step 2 >14</ step 2>\n<answer >14</answer>",
        REPAIRED,
        ["3 + 4 = 7", "14"],
        "14",
    ),
    "capitals": (
        "<STEP_1>3 + 4 = 7</STEP_1><Step_2>14</Step_2><ANSWER>14</ANSWER>",
        REPAIRED,
        ["3 + 4 = 7", "14"],
        "14",
    ),
    "attributes": (
        '<step_1 title="Add: > 3" n=\'1\'>x</step_1><step_1 title="Add" n=1>7</step_1><step id="2">14</step>',
        REPAIRED,
        ["7", "14"],
        None,
    ),
    "numbers that start at 0, and a gap": (
        "<step_0>7</step_0><step_5>14</step_5><answer>14</answer>",
        REPAIRED,
        ["7", "14"],
        "14",
    ),
    "empty steps": (
        "<step_1></step_1><step_2>14</step_2><answer> </answer><answer>14</answer>",
        REPAIRED,
        ["14"],
        "14",
    ),
    "words around tags": (
        "Sure!\n<step_1>7</step_1>\nand\n<step_2>14</step_2>\n<answer>14</answer>",
        REPAIRED,
        ["7", "14"],
        "14",
    ),
    "an answer without its closer": ("<step_1>7</step_1><step_2>14</step_2><answer>14", REPAIRED, ["7", "14"], "14"),
    "a box for a tag": (r"<step_1>7</step_1><step_2>So \boxed{14}</step_2>", REPAIRED, ["7", r"So \boxed{14}"], "14"),
    "the answer first": ("<answer>14</answer><step_1>7</step_1><step_2>14</step_2>", REPAIRED, ["7", "14"], "14"),
    "an answer's tag alone": (
        "3 + 4 = 7. And 7 * 2 = 14. <answer>14</answer> Bye.",
        SENTENCES,
        ["3 + 4 = 7.", "And 7 * 2 = 14."],
        "14",
    ),
    "an answer's tag before all": ("<answer>14</answer>\nFirst 7.\nThen 14.", LINES, ["First 7.", "Then 14."], "14"),
    "a tag wins": (r"<answer>14</answer> and \boxed{15}", SENTENCES, [r"and \boxed{15}"], "14"),
    # Thinking.
    "thinking": (
        "<think>It is 3.\n\nThe answer is 3.</think>\nFirst 7.\nThen 14.",
        LINES,
        ["First 7.", "Then 14."],
        None,
    ),
    "thinking that the template opened": (
        "It is 3.\n</think>\n<step_1>7</step_1><answer>7</answer>",
        SplitRule.TAGS,
        ["<step_1>7</step_1>"],
        "<answer>7</answer>",
    ),
    "thinking without end": (r"<think>7, so \boxed{7} <step_1>7</step_1>", SENTENCES, [], None),
    "thinking between": ("First 7.\n<thinking>hm</thinking>\nThen 14.", PARAGRAPHS, ["First 7.", "Then 14."], None),
    "thinking, steps and an answer": (
        "<think>hm</think><step 1>7<step 2>14<answer>14</answer>",
        REPAIRED,
        ["7", "14"],
        "14",
    ),
    "thinking before a bare answer": (
        "<think>3 + 4 = 7</think> <answer>7</answer>",
        SplitRule.TAGS,
        [],
        "<answer>7</answer>",
    ),
    # Headings.
    "bold titles": (
        "**Step 1: Add**\n3 + 4 = 7\n\n**Step 2: Double**\n7 * 2 = 14",
        NUMBERED,
        ["3 + 4 = 7", "7 * 2 = 14"],
        None,
    ),
    "bold markers": ("**Step 1** Add 3 and 4\n**Step 2** Double it", NUMBERED, ["Add 3 and 4", "Double it"], None),
    "bold titles before the text": (
        "**Step 1: Add.** 3 + 4 = 7\n**Step 2: Double.** 14",
        NUMBERED,
        ["3 + 4 = 7", "14"],
        None,
    ),
    "sections": (
        "Here we go.\n\n## Step 1: Add\n\nTake both.\n\n3 + 4 = 7\n\n"
        "## Step 2: Double\n\n7 * 2 = 14\n\n## Answer\n\n14",
        NUMBERED,
        ["Here we go.", "Take both.\n\n3 + 4 = 7", "7 * 2 = 14"],
        "14",
    ),
    "numbered sections": ("### 1. Add\n3 + 4 = 7\n### 2. Double\n14", NUMBERED, ["3 + 4 = 7", "14"], None),
    "markers alone": ("Step 1.\nAdd: 7\nStep 2.\nDouble: 14", NUMBERED, ["Add: 7", "Double: 14"], None),
    "dashes": ("Step 1 - Add: 7\nStep 2 – Double: 14", NUMBERED, ["Add: 7", "Double: 14"], None),
    "titles with nothing under them": (
        "**Step 1: 3 + 4 = 7**\n**Step 2: 7 * 2 = 14**",
        NUMBERED,
        ["3 + 4 = 7", "7 * 2 = 14"],
        None,
    ),
    "a heading among paragraphs": ("## Solution\n\nFirst 7.\n\nThen 14.", PARAGRAPHS, ["First 7.", "Then 14."], None),
    # Lists.
    "a small list among paragraphs": (
        "We look at the numbers that the text gives us.\n\nThey are these:\n1. three\n2. four\n\n"
        "Their sum is seven.\n\n"
        "Twice that sum is fourteen, as it was asked for.",
        PARAGRAPHS,
        [
            "We look at the numbers that the text gives us.",
            "They are these:\n1. three\n2. four",
            "Their sum is seven.",
            "Twice that sum is fourteen, as it was asked for.",
        ],
        None,
    ),
    "a list in a list": (
        "1. Add:\n   1. take 3\n   2. take 4\n2. Double: 14",
        NUMBERED,
        ["Add:\n   1. take 3\n   2. take 4", "Double: 14"],
        None,
    ),
    "what follows a list": (
        "1. Add: 7\n2. Double: 14\n\nThat is all.",
        NUMBERED,
        ["Add: 7", "Double: 14", "That is all."],
        None,
    ),
    # Blocks.
    "code": (
        "We run\n\n```\na = 7\n\nb = 14\n```\n\nIt is 14.",
        PARAGRAPHS,
        ["We run", "```\na = 7\n\nb = 14\n```", "It is 14."],
        None,
    ),
    "displays": (
        "Thus\n\n\\[\n3 + 4\n\n= 7\n\\]\n\nand $$\n7\n\n* 2$$ too",
        PARAGRAPHS,
        ["Thus", "\\[\n3 + 4\n\n= 7\n\\]", "and $$\n7\n\n* 2$$ too"],
        None,
    ),
    "environments": (
        "So\n\\begin{align*}\nx &= 7\\\\\ny &= 14\n\\end{align*}\nDone",
        LINES,
        ["So", "\\begin{align*}\nx &= 7\\\\\ny &= 14\n\\end{align*}", "Done"],
        None,
    ),
    "tables": (
        "The sums:\n| a | b |\n|---|---|\n| 3 | 4 |\nSo 7.",
        LINES,
        ["The sums:", "| a | b |\n|---|---|\n| 3 | 4 |"],
        "7",
    ),
    "displays in sentences": (
        r"We see \[ x = 7. Y = 8 \] here. Then 14.",
        SENTENCES,
        [r"We see \[ x = 7. Y = 8 \] here.", "Then 14."],
        None,
    ),
    "a display that never ends": (
        "Thus \\[ 7\n\nand \\[ 14 \\]\n\nDone",
        PARAGRAPHS,
        ["Thus \\[ 7", "and \\[ 14 \\]", "Done"],
        None,
    ),
}


def pieces(split: SplitAttempt) -> list[str]:
    return [split.text[slice(*span)] for span in split.steps]


def bodies(split: SplitAttempt) -> list[str]:
    return [step.body for step in parse_trace(split.tagged).steps]


def answer(split: SplitAttempt) -> str | None:
    return None if split.answer is None else split.text[slice(*split.answer)]


@pytest.mark.parametrize("name", ATTEMPTS)
def test_an_attempt_is_read_as_it_was_meant(name: str) -> None:
    text, rule, steps, final = ATTEMPTS[name]
    split = split_attempt(text)
    assert (split.rule, answer(split)) == (rule, final)
    assert (pieces(split) if rule is SplitRule.TAGS else bodies(split)) == steps
    trace = parse_trace(split.tagged)
    assert set(trace.issues) <= ({TraceIssue.NO_ANSWER} if final is None else set())


@pytest.mark.parametrize(
    "odd", ["<STEP 1>7 * 7", "<step_1>3 + 4 = 7 <step>7 * 7", "Sure! <step_1>7</step_1><step_2>7 *"]
)
def test_a_last_step_that_breaks_off_stays_unfinished(odd: str) -> None:
    split = split_attempt(odd)
    unfinished = parse_trace(split.tagged).unfinished
    assert split.rule is REPAIRED and unfinished is not None and odd.endswith(unfinished.body)


@pytest.mark.parametrize(
    "text",
    [
        "<step_1> 3 + 4 = 7 </step_1>  <step_2>\n7 \n</step_2>\n\n<answer> 14 </answer> \n",
        "<step_1>the answer is <b>3</b> ## 1. x\n\n| a |</step_1><answer>4</answer>",
        "<step_1>a <step 2> b <think> c</step_1><answer>4</answer>",
        "<step_1>a</step_1>\n<step_2> 7 *",
        "<step_1>a</step_1>\n<step_2>",
        "<step_1>a</step_1>",
        "<answer>4</answer>",
    ],
)
def test_text_in_the_grammar_stays_as_it_is(text: str) -> None:
    split = split_attempt(text)
    trace = parse_trace(text)
    assert (split.rule, split.tagged) == (SplitRule.TAGS, text)
    assert split.steps == tuple(step.span for step in trace.steps)


@pytest.mark.parametrize(
    ("text", "tagged"),
    [
        (
            "<step_1>3\u200b + 4\r\n= 7</step_1><answer>\ufeff7</answer>",
            "<step_1>3 + 4\n= 7</step_1><answer>7</answer>",
        ),
        ("\ufeffFirst\xad 7.\rThen\x00 1\u20604.", "<step_1>First 7.</step_1>\n<step_2>Then 14.</step_2>"),
        ("a\u2028b\u202ec\x0bd", "<step_1>a</step_1>\n<step_2>bc</step_2>\n<step_3>d</step_3>"),
        ("First 7.\r\n\r\nThen\r\n14.", "<step_1>First 7.</step_1>\n<step_2>Then\n14.</step_2>"),
        ("par\u2029agraph", "<step_1>par</step_1>\n<step_2>agraph</step_2>"),
        ("<st\u200bep_1>7</step\xad_1><answer>7</answer>", "<step_1>7</step_1><answer>7</answer>"),
        ("7\u200d = 7 👩\u200d👧", "<step_1>7 = 7 👩\u200d👧</step_1>"),
    ],
)
def test_line_ends_are_one_and_what_shows_nothing_is_dropped(text: str, tagged: str) -> None:
    assert split_attempt(text).tagged == tagged


def test_spans_point_into_the_text_as_it_was_sent() -> None:
    text = "\ufeff<think>\r\n3</think>\r\n<step 1>3 +\u200b 4\r\n= 7</step 1>\r\n"
    text += "<step 2>7</step 9> * 2 = 1\xad4 <answer>\r\n14\r\n"
    split = split_attempt(text)
    assert pieces(split) == ["3 +\u200b 4\r\n= 7", "7</step 9> * 2 = 1\xad4"]
    assert bodies(split) == ["3 + 4\n= 7", "7  * 2 = 14"]
    assert answer(split) == "14"
    first, second, final = split.segments
    for segment, letter, place in (
        (first, "=", text.index("= 7")),
        (second, "*", text.index("*")),
        (final, "4", len(text) - 3),
    ):
        at = split.tagged.index(letter, segment.tagged_body[0])
        assert split.place_in_text(segment, at) == place
        assert split.place_in_text(segment, segment.tagged[0]) == segment.sent[0]
        assert split.place_in_text(segment, segment.tagged[1] - 1) == segment.sent[1] - 1


ANSWERS: dict[str, tuple[str, AnswerRule]] = {
    r"So $x = \boxed{7}$, as it should.": ("7", AnswerRule.BOXED),
    r"It is \fbox{7}.": ("7", AnswerRule.BOXED),
    r"It is \boxed 7.": ("7", AnswerRule.BOXED),
    r"It is \boxed{\$7,000}.": ("7,000", AnswerRule.BOXED),
    r"It is $\boxed{\left\{7!\right\}}$": (r"\left\{7!\right\}", AnswerRule.BOXED),
    "#### Step 1\nAdd.\n#### 7": ("7", AnswerRule.HASHES),
    "He has 3+4=<<3+4=7>>7 apples.\n#### 7\n": ("7", AnswerRule.HASHES),
    "We add.\nA: 7": ("7", AnswerRule.PHRASE),
    "We add.\n\n**Final Answer:**\n7": ("7", AnswerRule.PHRASE),
    "We add.\n\n**Final Answer**\n\n\\[ 7 \\]": ("7", AnswerRule.PHRASE),
    "We add.\n\n### Final Answer\n\n7": ("7", AnswerRule.PHRASE),
    "**Answer: 7**": ("7", AnswerRule.PHRASE),
    "The answer is 7, because 3 + 4 = 7.": ("7", AnswerRule.PHRASE),
    "The answer is 7 since 3 + 4 is.": ("7", AnswerRule.PHRASE),
    "The final answer is $7$. I hope it is correct.": ("7", AnswerRule.PHRASE),
    "Final Answer: The final answer is 7. I hope it is correct.": ("7", AnswerRule.PHRASE),
    "The answer is therefore: **7**.": ("7", AnswerRule.PHRASE),
    r"The answer is \(7\) candles and lights": ("7", AnswerRule.PHRASE),
    "The answer is that there are **7** such numbers.": ("7", AnswerRule.PHRASE),
    "Final answer - There are 7 whole numbers that fit, from 1 to 9.": ("7", AnswerRule.PHRASE),
    "The answer to the question is 7!": ("7", AnswerRule.PHRASE),
    "The final answer, by what is given, is:\n\\[\n7\n\\]": ("7", AnswerRule.PHRASE),
    "The answer is: <<3+4=7>>7": ("7", AnswerRule.PHRASE),
    "The answer is 7. The answer is correct.": ("7", AnswerRule.PHRASE),
    "So the answer = $1,007.50.": ("1,007.50", AnswerRule.PHRASE),
    "The answer is .5": (".5", AnswerRule.PHRASE),
    "The answer is (3, 4).": ("(3, 4)", AnswerRule.PHRASE),
    "The answer is $x = 3$ and $y = 4$.": ("$x = 3$ and $y = 4$", AnswerRule.PHRASE),
}
CONCLUSIONS = {
    "Therefore, Dana can travel 36 miles in six hours.": "36",
    "3 + 4 = 7. So she earns $18.50 every day!": "18.50",
    "We add: Thus, the charge was **27%**.": "27%",
    "Hence, the area is \\(196\\) square feet.\n": "196",
    "So, it is approximately \\$26,518.": "26,518",
    "Finally, that is 3/4 of the cake.": "3/4",
}
UNCONCLUDED = [
    "She earns $18 every day.",
    "So she earns $18 every day",
    "So she earns $18 every",
    "So far she has 18 apples.",
    "So 3 of the 18 apples are red.",
    "So x = 18.",
    "So 3 + 4 are 18?",
    "So she comes 4th.",
    "So it is a 4-sided figure.",
    "So it is 3:30.",
    "So the range is [0, \\infty).",
    "So it is \\frac{x}{2}.",
    "So there is none.",
    "Thus step 3 is wrong.",
    "Therefore we are in case 2.",
    "So the result is not 5.",
    "So it can't be 5.",
    "Therefore, she has 18. Each is red.",
    "So " + "the apples of the garden and " * 20 + "are 18.",
]


@pytest.mark.parametrize("text", CONCLUSIONS)
@pytest.mark.parametrize("before", ["", "It was 5.\n", "So it was 5.\n\n"])
def test_a_last_sentence_that_concludes_with_one_number_answers(text: str, before: str) -> None:
    split = split_attempt(before + text)
    assert (answer(split), split.answer_rule) == (CONCLUSIONS[text], AnswerRule.CONCLUSION)
    in_steps = join_steps([before, text] if before else [text])
    assert (answer(in_steps), in_steps.answer_rule) == (CONCLUSIONS[text], AnswerRule.CONCLUSION)


@pytest.mark.parametrize("text", UNCONCLUDED)
def test_what_may_go_on_has_no_answer(text: str) -> None:
    assert split_attempt(f"We add.\n\n{text}").answer is None


def test_an_announced_answer_goes_before_a_conclusion() -> None:
    assert answer(split_attempt("The answer is 7.\n\nSo she has 8 apples.")) == "7"


@pytest.mark.parametrize("tag", ["step_1", "Step 1"])
def test_who_writes_step_tags_has_answered_with_a_tag_alone(tag: str) -> None:
    assert split_attempt(f"<{tag}>So she has 8 apples.</{tag}>").answer is None


@pytest.mark.parametrize("text", ANSWERS)
@pytest.mark.parametrize("before", ["", "It was 5.\n", "The answer is 5, I thought.\n"])
def test_the_answers_span_covers_the_value_alone(text: str, before: str) -> None:
    split = split_attempt(before + text)
    assert (answer(split), split.answer_rule) == ANSWERS[text]


@pytest.mark.parametrize(
    "text",
    [
        "A: 3\nB: 4\nWhich one?",
        "What is the answer?",
        "The answer is not 7.",
        r"\boxed{}",
        "#### 7 is a heading\nand this is not",
    ],
)
def test_where_no_answer_is_stated_none_is_found(text: str) -> None:
    assert split_attempt(text).answer is None


def test_sent_steps_all_stay_whatever_they_hold() -> None:
    steps = ["3 + 4 = 7", "## Step 2", "\u200b", "#### 14", "The answer is 14.", "<think>15</think>", " \r\n14"]
    split = join_steps(steps)
    assert bodies(split) == [
        "3 + 4 = 7",
        "## Step 2",
        "\u200b",
        "#### 14",
        "The answer is 14.",
        "<think>15</think>",
        "14",
    ]
    assert pieces(split) == [step.strip() for step in steps]
    assert answer(split) == "14"
