"""A grammar allows what its definition says, as llguidance reads it. The other dialect: tests/vllm/test_gbnf.py."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from transformers import AutoTokenizer

from stepalign.critique.quotation import is_quotation
from stepalign_critic.decoding.grammar import Choice, Free, Grammar, Literal, Onward, Sequenced, to_gbnf, to_lark
from stepalign_critic.decoding.tokens import GrammarTokens
from stepalign_critic.errors import UnsupportedRequestError
from stepalign_lab.smollm2 import find_gguf
from support.grammar_cases import FREE, ODD, OPENINGS, WRONG, corrected


class Bytes:
    """A tokenizer of bytes. The token 256 ends a text."""

    tokens = (*(bytes([value]) for value in range(256)), b"<eos>")
    special_token_ids = (256,)
    eos_token_id = 256
    bos_token_id = None

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@cache
def byte_tokens() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(Bytes()))


@cache
def smollm2_tokens() -> GrammarTokens:
    """Those of a real vocabulary, of 49,152 tokens."""
    path = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    return GrammarTokens(tokenizer, (tokenizer.eos_token_id,), len(tokenizer))


@cache
def compiled(grammar: Grammar) -> str:
    return LLMatcher.grammar_from_lark(to_lark(grammar))


def allows(grammar: Grammar, text: str) -> bool:
    matcher = LLMatcher(byte_tokens(), compiled(grammar))
    assert not matcher.is_error(), matcher.get_error()
    sent = list(text.encode())
    return matcher.try_consume_tokens(sent) == len(sent) and matcher.is_accepting()


@pytest.mark.parametrize(("text", "allowed"), FREE)
def test_free_text_is_what_no_tag_and_no_quotation_is(text: str, allowed: bool) -> None:
    assert allows(corrected(WRONG), f"{text}</step_2>") is allowed
    if "<" not in text and text.strip():
        assert is_quotation(text, WRONG) is not allowed


@pytest.mark.parametrize(("wrong", "text", "allowed"), OPENINGS)
def test_openings_that_are_no_quotations(wrong: str, text: str, allowed: bool) -> None:
    assert allows(corrected(wrong), f"{text}</step_2>") is allowed
    assert is_quotation(text, wrong) is not allowed


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: f"U+{ord(odd):04X}")
def test_odd_characters_stand_for_themselves(odd: str) -> None:
    assert allows(Literal(f"a{odd}b"), f"a{odd}b")
    assert not allows(Literal(f"a{odd}b"), "aab")
    wrong = f"3 {odd} 4 = 7"
    assert not allows(corrected(wrong), f"{wrong}</step_2>")
    assert allows(corrected(wrong), "3 Q 4 = 7</step_2>")


@settings(max_examples=150, deadline=None)
@given(
    wrong=st.text(st.sampled_from('ab1 .=+\n"('), min_size=1, max_size=8).filter(lambda text: text.strip()),
    text=st.text(st.sampled_from('ab1 .=+\n"('), min_size=1, max_size=12).filter(lambda text: text.strip()),
)
@example(wrong="1", text="1")
@example(wrong="a b 1", text="a b 1 1")
@example(wrong="a b 1", text=" a b 1 1")
@example(wrong="a b 1", text='"a b 1 1')
@example(wrong="a b 1", text="a b 1 1. ")
def test_lark_and_the_validator_agree_on_quotations(wrong: str, text: str) -> None:
    opens_oddly = text[:2].isspace()
    if not opens_oddly:
        assert allows(corrected(wrong), f"{text}</step_2>") is not is_quotation(text, wrong)


def test_parts_and_ways() -> None:
    answer = Sequenced((Literal("<answer>"), Free(20, "</answer>", one_line=True)))
    grammar = Choice((Sequenced((Literal('<step_3>"\\'), Free(40, "</step_3>"), Literal("\n"), answer)), answer))
    assert allows(grammar, "<answer>7</answer>")
    assert allows(grammar, '<step_3>"\\so it is 7</step_3>\n<answer>7</answer>')
    assert not allows(grammar, "<answer>7\n8</answer>")
    assert not allows(grammar, "<step_3>so it is 7</step_3>\n<answer>7</answer>")
    assert not allows(grammar, "")


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("<answer>7</answer>", True),
        ("<step_4>so</step_4>\n<answer>7</answer>", True),
        ("<step_4>so</step_4>\n<step_5>it is</step_5>\n<answer>7</answer>", True),
        ("<step_4>so</step_4>\n<step_5>it</step_5>\n<step_6>is</step_6>\n<answer>7</answer>", False),
        ("<step_5>so</step_5>\n<answer>7</answer>", False),
        ("<step_4>so</step_4><answer>7</answer>", False),
        ("<step_4>so</step_4>\n", False),
    ],
)
def test_a_bounded_number_of_steps_and_then_the_end(text: str, allowed: bool) -> None:
    onward = Onward(4, 2, 40, "\n", Literal("<answer>7</answer>"))
    assert allows(onward, text) is allowed
    assert to_gbnf(onward) == to_gbnf(onward.expanded()) and "<step_5>" in to_gbnf(onward)


def test_free_text_is_bounded_in_tokens_where_they_are_known() -> None:
    matcher = LLMatcher(byte_tokens(), compiled(Sequenced((Free(10, "</a>"), Literal("!")))))
    taken = matcher.try_consume_tokens(list(b"12345678901234567890"))
    assert taken <= 11
    assert matcher.compute_ff_tokens() == list(b"!")


def test_a_nul_is_written_in_one_dialect_and_refused_in_the_other() -> None:
    assert allows(Literal("a\x00b"), "a\x00b")
    assert not allows(corrected("3 \x00 4 = 7"), "3 \x00 4 = 7</step_2>")
    with pytest.raises(UnsupportedRequestError, match=r"U\+0000, .*send it without"):
        to_gbnf(Literal("a\x00b"))
    assert "\x00" not in to_gbnf(corrected("3 \x00 4 = 7"))


@pytest.mark.parametrize(
    "sentence",
    [
        "The size of group {} is then {} / 9 = 6, ",
        "所以第{}组有 {} 人，",
        "\\frac{{{}}}{{{}}} = 6 ",
        "!? ..{}. ((({} ",
        "é×ß {} {} ",
    ],
    ids=["words", "han", "latex", "marks", "latin"],
)
def test_a_long_wrong_step_has_a_grammar(sentence: str) -> None:
    """llguidance has room for so many states and no more; how many it makes depends on the vocabulary."""
    sentences = [sentence.format(number, number * number) for number in range(4000 // len(sentence))]
    wrong = f"First {''.join(sentences)} so it is 7"
    grammar = Free(20_000, "</step_2>", unlike=wrong)
    assert allows(grammar, f"{wrong} after all</step_2>") is False
    assert allows(grammar, f"{wrong[:-1]}8</step_2>") is True
    assert allows(grammar, "It is 8.</step_2>") is True
    assert not smollm2_tokens().matcher(grammar).is_error()
