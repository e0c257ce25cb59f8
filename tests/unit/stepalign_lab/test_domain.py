"""The lab's domain by hand."""

from __future__ import annotations

import random

import pytest

from stepalign_lab.domain import (
    FACTS,
    Chain,
    apply,
    parse_question,
    reference_solution,
    sample_chain,
    step_bodies,
    tagged,
    wrong_facts,
)


@pytest.mark.parametrize(
    ("fact", "result"), [((7, "*", 7), 9), ((3, "-", 8), 5), ((9, "+", 9), 8), ((0, "-", 1), 9), ((6, "*", 5), 0)]
)
def test_results_are_modulo_ten(fact: tuple[int, str, int], result: int) -> None:
    assert apply(*fact) == result


def test_a_chain_is_evaluated_from_left_to_right() -> None:
    chain = parse_question("3 + 4 * 7 - 2")
    assert chain == Chain(3, (("+", 4), ("*", 7), ("-", 2)))
    assert chain.question == "3 + 4 * 7 - 2"
    assert chain.results() == [7, 9, 7]


def test_a_wrong_fact_carries_through_the_chain() -> None:
    table = {fact: apply(*fact) for fact in FACTS} | {(3, "+", 4): 6}
    assert parse_question("3 + 4 * 7 - 2").results(table) == [6, 2, 0]


@pytest.mark.parametrize("question", ["", "3", "3 +", "3 + 12", "3 / 4", "x + 1", "3 4 5", "+ 3 4", "3 + ²", "3 + 4 *"])
def test_what_is_no_chain_is_refused(question: str) -> None:
    with pytest.raises(ValueError, match="no chain"):
        parse_question(question)


def test_both_wordings_state_the_same_facts() -> None:
    chain = parse_question("3 + 4 * 7")
    assert step_bodies(chain, [7, 9], "own") == ["3 + 4 = 7", "7 * 7 = 9"]
    assert step_bodies(chain, [7, 9], "reference") == ["7 is 4 + of 3", "9 is 7 * of 7"]
    assert step_bodies(chain, [6, 2], "own") == ["3 + 4 = 6", "6 * 7 = 2"]
    assert reference_solution(chain) == "7 is 4 + of 3 ; 9 is 7 * of 7 ; so 9"


def test_tagged_text() -> None:
    assert tagged(["a", "b"], 4) == "<step_1> a </step_1> <step_2> b </step_2> <answer> 4 </answer>"
    assert tagged(["a"], None) == "<step_1> a </step_1>"


def test_a_fifth_of_the_facts_is_learned_wrongly_and_none_of_it_is_right() -> None:
    wrong = wrong_facts(0)
    assert len(FACTS) == len(set(FACTS)) == 300 and len(wrong) == 60 and wrong.keys() <= set(FACTS)
    assert all(result != apply(*fact) and 0 <= result <= 9 for fact, result in wrong.items())
    assert wrong == wrong_facts(0) != wrong_facts(1)
    assert len(wrong_facts(0, share=0.5)) == 150


def test_sampled_chains_have_four_to_six_operations() -> None:
    rng = random.Random(0)
    chains = [sample_chain(rng) for _ in range(300)]
    assert {len(chain.operations) for chain in chains} == {4, 5, 6}
    assert all(parse_question(chain.question) == chain for chain in chains)
