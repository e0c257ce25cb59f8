"""The dialect of grammars that servers get, as xgrammar reads it, which vLLM brings along."""

from __future__ import annotations

import random
from functools import cache

import pytest
from xgrammar import Grammar as ReadGrammar
from xgrammar import GrammarCompiler, GrammarMatcher, TokenizerInfo

from stepalign.critique.quotation import is_quotation
from stepalign_critic.decoding.grammar import Choice, Free, Grammar, Literal, Sequenced, to_gbnf
from support.grammar_cases import FREE, ODD, OPENINGS, WRONG, corrected

END = 256


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TokenizerInfo([*(bytes([value]) for value in range(256)), b"<eos>"], stop_token_ids=[END]))


def allows(grammar: Grammar, text: str) -> bool:
    reader = GrammarMatcher(compiler().compile_grammar(ReadGrammar.from_ebnf(to_gbnf(grammar))))
    return all(reader.accept_token(byte) for byte in text.encode()) and reader.accept_token(END)


@pytest.mark.parametrize(("text", "allowed"), FREE)
def test_free_text_is_what_no_tag_and_no_quotation_is(text: str, allowed: bool) -> None:
    assert allows(corrected(WRONG), f"{text}</step_2>") is allowed


@pytest.mark.parametrize(("wrong", "text", "allowed"), OPENINGS)
def test_openings_that_are_no_quotations(wrong: str, text: str, allowed: bool) -> None:
    assert allows(corrected(wrong), f"{text}</step_2>") is allowed


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: f"U+{ord(odd):04X}")
def test_odd_characters_stand_for_themselves(odd: str) -> None:
    assert allows(Literal(f"a{odd}b"), f"a{odd}b")
    assert not allows(Literal(f"a{odd}b"), "aab")
    wrong = f"3 {odd} 4 = 7"
    assert not allows(corrected(wrong), f"{wrong}</step_2>")
    assert allows(corrected(wrong), "3 Q 4 = 7</step_2>")


def test_no_quotation_is_allowed() -> None:
    choose = random.Random(0)
    quotations = 0
    for _ in range(400):
        wrong, other = ("".join(choose.choices('ab1 .=+<\n"(', k=choose.randint(1, 9))) for _ in range(2))
        if not wrong.strip():
            continue
        for text in (other, wrong, wrong + other, f" {wrong}"):
            if text.strip() and allows(corrected(wrong), f"{text}</step_2>"):
                assert not is_quotation(text, wrong), (wrong, text)
            quotations += is_quotation(text, wrong)
    assert quotations > 100


def test_parts_and_ways() -> None:
    answer = Sequenced((Literal("<answer>"), Free(20, "</answer>", one_line=True)))
    grammar = Choice((Sequenced((Literal('<step_3>"\\'), Free(40, "</step_3>"), Literal("\n"), answer)), answer))
    assert allows(grammar, "<answer>7</answer>")
    assert allows(grammar, '<step_3>"\\so it is 7</step_3>\n<answer>7</answer>')
    assert not allows(grammar, "<answer>7\n8</answer>")
    assert not allows(grammar, "<step_3>so it is 7</step_3>\n<answer>7</answer>")


def test_free_text_is_bounded_in_characters() -> None:
    assert allows(Free(10, "</a>"), "1234567890123456789</a>")
    assert not allows(Free(10, "</a>"), "123456789012345678901</a>")
