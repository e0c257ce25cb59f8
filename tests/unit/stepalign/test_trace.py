"""The trace parser: a stated result for every text, exact spans, round trip."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepalign import parse_trace, render_trace
from stepalign.critique.trace import TraceIssue as Issue

body = st.text(max_size=30).filter(lambda text: text.strip() and "<" not in text)
# Texts that are mostly tags, so that every rule of the parser is met.
pieces = st.sampled_from(
    ["<step_1>", "</step_1>", "<step_2>", "</step_2>", "<step_3>", "<answer>", "</answer>", "𝛑 = 3", " ", "x", "<", "é"]
)


@given(st.lists(body, max_size=6), body)
def test_what_is_rendered_is_parsed_back(bodies: list[str], answer: str) -> None:
    text = render_trace(bodies, answer, separator="\n")
    trace = parse_trace(text)
    assert trace.well_formed
    assert [step.body for step in trace.steps] == bodies
    assert trace.answer is not None and trace.answer.body == answer.strip()


@given(st.lists(pieces, max_size=25).map("".join))
def test_any_text_has_a_result_with_exact_spans(text: str) -> None:
    trace = parse_trace(text)
    position = 0
    for step in trace.steps:
        assert step.span[0] >= position
        assert text[slice(*step.body_span)] == step.body
        assert text[step.span[0] : step.body_span[0]] == f"<step_{step.number}>"
        if step.closed:
            assert text[step.body_span[1] : step.span[1]] == f"</step_{step.number}>"
        position = step.span[1]
    if trace.answer is not None:
        assert text[slice(*trace.answer.body_span)].strip() == trace.answer.body
        assert trace.answer.span[0] >= position
    assert (trace.answer is None) == (Issue.NO_ANSWER in trace.issues)


@given(st.text(max_size=200))
def test_arbitrary_text_never_raises(text: str) -> None:
    assert parse_trace(text).steps is not None


def test_spans_count_code_points() -> None:
    text = "<step_1>𝛑≈3</step_1><answer>3</answer>"
    trace = parse_trace(text)
    assert trace.steps[0].body_span == (8, 11)
    assert text[slice(*trace.steps[0].span)] == "<step_1>𝛑≈3</step_1>"


@pytest.mark.parametrize(
    ("text", "bodies", "answer", "issues"),
    [
        ("", [], None, {Issue.NO_ANSWER}),
        ("just words", [], None, {Issue.OUTSIDE, Issue.NO_ANSWER}),
        ("<step_1>a</step_1>", ["a"], None, {Issue.NO_ANSWER}),
        (
            "<step_1>a<step_2>b</step_2>c</step_1><answer>1</answer>",
            ["a", "b"],
            "1",
            {Issue.UNCLOSED, Issue.NESTED, Issue.OUTSIDE},
        ),
        ("<step_1>a</step_1><step_1>b</step_1><answer>1</answer>", ["a", "b"], "1", {Issue.REPEATED}),
        (
            "<step_2>a</step_2><step_1>b</step_1><answer>1</answer>",
            ["a", "b"],
            "1",
            {Issue.MISSING_NUMBER, Issue.OUT_OF_ORDER},
        ),
        ("<step_1>a</step_1><step_3>b</step_3><answer>1</answer>", ["a", "b"], "1", {Issue.MISSING_NUMBER}),
        ("<step_1>a</step_1><step_2>b", ["a", "b"], None, {Issue.UNCLOSED, Issue.NO_ANSWER}),
        ("<step_1> </step_1><answer>1</answer>", [" "], "1", {Issue.EMPTY}),
        ("<step_1>a</step_1></step_4><answer>1</answer>", ["a"], "1", {Issue.STRAY_CLOSE}),
        ("<step_1>a</step_1><answer>1", ["a"], None, {Issue.UNCLOSED, Issue.NO_ANSWER}),
        ("<answer>1</answer> and more <step_1>a</step_1>", [], "1", {Issue.TRAILING}),
        ("<answer> </answer>", [], "", {Issue.EMPTY}),
        ("<step_0>a</step_0><answer>1</answer>", [], "1", {Issue.OUTSIDE}),
    ],
)
def test_each_broken_text_has_its_stated_result(
    text: str, bodies: list[str], answer: str | None, issues: set[Issue]
) -> None:
    trace = parse_trace(text)
    assert [step.body for step in trace.steps] == bodies
    assert (trace.answer.body if trace.answer else None) == answer
    assert set(trace.issues) == issues


def test_a_hostile_text_of_many_tags_has_a_result_too() -> None:
    text = "".join(f"<step_{i}>" for i in range(1, 20_001)) + "</step_1>" * 20_000
    trace = parse_trace(text)
    assert len(trace.steps) == 20_000
    assert set(trace.issues) == {Issue.UNCLOSED, Issue.NESTED, Issue.NO_ANSWER}


def test_an_unfinished_last_step_is_told_apart_from_complete_ones() -> None:
    trace = parse_trace("<step_1>a</step_1><step_2>b")
    assert trace.unfinished is not None and trace.unfinished.number == 2
    assert [step.number for step in trace.complete_steps] == [1]
    assert parse_trace("<step_1>a<answer>1</answer>").unfinished is None
