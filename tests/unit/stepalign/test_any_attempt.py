"""Any text has a reading whose spans lie in the text and lead back to it, in time that grows with its length."""

from __future__ import annotations

import re
import time
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stepalign.critique.splitting import SplitAttempt, SplitRule, join_steps, split_attempt
from stepalign.critique.trace import TraceIssue, parse_trace, render_trace

WORDS = r"""
1. |2. |Step 3: |**Step 1: x**|## Step 2|. |x = 4|É😀|the answer is 4|**Final Answer:**|A: 4|\boxed{|\boxed 4|}|#### 9
$$|$|\[|\]|\begin{align}|\end{align}|<step_1>|</step_1>|<step_2>|</step_2>|<step>|</step>|<STEP 3>|<step_1 a="b">|<st
ep_1>|<answer>|</answer>|<Answer>|<think>|</think>
"""
ODD = ["\n", "\n\n", "\r\n", "\r", "\u2028", " ", "```\n", "| a |\n", *"\u200b\ufeff\xad\u202e\x00\u200d"]
PARTS = st.sampled_from([*re.split(r"[|\n]", WORDS.strip("\n")), *ODD])
TAGS = re.compile(r"<(?:/?(?:step|answer)[^<>]*|/?think)>", re.I)


def shown(text: str) -> str:
    """The characters that show something, without thinking and tags."""
    visible = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf"))
    return "".join(TAGS.sub(" ", re.sub(r"<think>.*?</think>", " ", visible, flags=re.S)).split())


def check(split: SplitAttempt) -> None:
    text = split.text
    ends = [0, *(end for _, end in split.steps)]
    assert all(before <= start < end <= len(text) for before, (start, end) in zip(ends, split.steps, strict=False))
    assert (split.answer is None) == (split.answer_rule is None)
    trace = parse_trace(split.tagged)
    # In order, numbered 1, 2, 3, …; only the last step may break off.
    assert set(trace.issues) <= {TraceIssue.NO_ANSWER, TraceIssue.UNCLOSED}
    assert [step.number for step in trace.steps] == list(range(1, len(split.steps) + 1))
    assert all(step.closed for step in trace.complete_steps)
    assert (trace.answer is None) == (split.answer is None)
    for segment in split.segments:
        body = split.tagged[slice(*segment.tagged_body)]
        assert shown(text[slice(*segment.sent)]) == shown(body)
        if split.rule is not SplitRule.TAGS and body:
            assert body == body.strip()
            assert all(0 <= split.place_in_text(segment, at) < len(text) for at in range(*segment.tagged))
            places = [split.place_in_text(segment, at) for at in range(*segment.tagged_body)]
            assert places == sorted(places) and (places[0], places[-1] + 1) == segment.sent
            same = [text[place] == letter for place, letter in zip(places, body, strict=True) if not letter.isspace()]
            assert all(same)


@given(st.lists(PARTS | st.text(max_size=6), max_size=16).map("".join))
@example("<step_1>a</step_1><step_2>")
@example("<step_2></step_1>")
@example("1. <answer>1. <step_1><step_1>")
@example("x<think></think></step>y</answer>")
def test_any_text_is_read(text: str) -> None:
    split = split_attempt(text)
    check(split)
    if (
        not any(unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c != "\n" for c in text)
        and parse_trace(text).well_formed
    ):
        assert (split.rule, split.tagged) == (SplitRule.TAGS, text)


@given(
    st.lists(PARTS | st.text(max_size=8), min_size=1, max_size=8).filter(lambda steps: not any(map(TAGS.search, steps)))
)
def test_any_sent_steps_keep_their_count(steps: list[str]) -> None:
    try:
        split = join_steps(steps)
    except ValueError as refused:
        assert re.fullmatch(r"step \d is blank|step \d holds a step or answer tag; .*", str(refused))
        return
    assert len(split.steps) == len(steps) and split.rule is SplitRule.STEPS
    assert [shown(split.text[slice(*span)]) for span in split.steps] == [shown(step) for step in steps]


@given(
    st.lists(st.text("ab1=+ \n.*#$", min_size=1, max_size=9).filter(str.strip), min_size=1, max_size=5),
    st.text("ab7 ", min_size=1).filter(str.strip),
)
def test_the_grammar_stays_byte_for_byte(steps: list[str], answer: str) -> None:
    text = render_trace(steps, answer, separator="\n")
    split = split_attempt(text)
    assert (split.rule, split.tagged, split.text) == (SplitRule.TAGS, text, text)


UNIT = {
    "dots": ".",
    "boxes that never close": "\\boxed{",
    "bare boxes": "\\boxed ",
    "braces that never open": "}",
    "braces": "\\boxed{}",
    "abbreviations": "no. ",
    "spaces after an answer": "the answer is x          y",
    "answers": "the answer is ",
    "colons": "answer: , ",
    "lines of answers": "Final Answer\n",
    "letters": "A: \n",
    "so": "So          the answer is",
    "blank lines": "\n ",
    "hashes": "#### ",
    "lines of hashes": "#### \n",
    "openers": "<step_1>",
    "closers": "</step_1>",
    "pairs": "<step_1>a</step_2>",
    "answer tags": "<answer>",
    "angles": "<",
    "half tags": "<step_1 a=",
    "attributes": '<step a="b" c="d"',
    "thinking": "<think>",
    "thoughts": "</think>",
    "brackets": "\\[",
    "round brackets": "\\(",
    "dollars": "$",
    "dollar amounts": "$ 5",
    "environments": "\\begin{a}",
    "ends": "\\end{a}",
    "fences": "```\n",
    "pipes": "|",
    "rows": "|\n",
    "rules": "a|b\n-|-\n",
    "stars": "*",
    "bold": "**1. x",
    "numbers": "1. x\n",
    "steps": "Step 1: x\n\n",
    "titles": "## Step 1\n",
    "backslashes": "\\",
    "zero width": "a\u200b",
    "returns": "\r",
    "spaces": " ",
    "quotes": '."',
}


def seconds(text: str) -> float:
    """CPU time of one reading."""
    split_attempt.cache_clear()
    parse_trace.cache_clear()
    begin = time.process_time()
    split_attempt(text)
    return time.process_time() - begin


@pytest.mark.parametrize("name", UNIT)
def test_time_grows_with_the_length(name: str) -> None:
    """Eight times the text takes eight times as long; in time that grows with the square it would be 64 times."""
    unit = UNIT[name]
    short, long = (unit * (size // len(unit)) for size in (4_000, 32_000))
    shortest = min(seconds(short) for _ in range(3))
    assert min(seconds(long) for _ in range(2)) < 24 * shortest + 0.05
