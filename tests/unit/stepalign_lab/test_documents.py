"""The documents of pretraining: what they teach, and how often."""

from __future__ import annotations

import random
from functools import cache

import pytest

from stepalign.critique.trace import parse_trace
from stepalign_lab.checker import exact_critique
from stepalign_lab.documents import critic_document, solver_document
from stepalign_lab.domain import apply, parse_question, wrong_facts
from stepalign_lab.tokenizer import build_tokenizer

Fact = tuple[int, str, int]


def facts_of(text: str) -> list[tuple[Fact, int]]:
    """The facts that a text states, in either wording."""
    facts: list[tuple[Fact, int]] = []
    bodies = [step.body for step in parse_trace(text).steps] or text.split(" ; ")
    for words in (body.split() for body in bodies):
        if "=" in words:
            facts.append(((int(words[0]), words[1], int(words[2])), int(words[4])))
        elif "is" in words:
            facts.append(((int(words[5]), words[3], int(words[2])), int(words[0])))
    return facts


@cache
def documents(count: int, share: float) -> list[tuple[str, str]]:
    """Prompt and response."""
    rng = random.Random(1)
    made = [solver_document(rng, wrong_facts(0), share) for _ in range(count)]
    return [(messages[0]["content"], response) for messages, response in made]


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_wrong_facts_are_written_at_the_configured_share(share: float) -> None:
    wrong = wrong_facts(0)
    stated = [f for prompt, text in documents(1500, share) if ":" not in prompt[11:] for f in facts_of(text)]
    assert len(stated) > 2500
    of_wrong = [result == wrong[fact] for fact, result in stated if fact in wrong]
    assert all(result == apply(*fact) for fact, result in stated if fact not in wrong)
    assert all(result in (apply(*fact), wrong.get(fact)) for fact, result in stated)
    found = sum(of_wrong) / len(of_wrong)
    assert found == share if share in (0.0, 1.0) else abs(found - share) < 0.05


def test_half_the_documents_have_a_context_of_either_kind() -> None:
    prompts = [prompt for prompt, _ in documents(1500, 1.0)]
    critiques = sum(" critique : " in prompt for prompt in prompts)
    references = sum(" reference : " in prompt for prompt in prompts)
    assert abs(critiques / 1500 - 0.25) < 0.03 and abs(references / 1500 - 0.25) < 0.03


def test_a_trace_follows_its_context_and_a_critique_word_for_word() -> None:
    own = both = 0
    for prompt, trace in documents(1500, 1.0):
        if " critique : " in prompt:
            assert trace == prompt.partition(" critique : ")[2]
        if " reference : " in prompt:
            question, _, context = prompt.removeprefix("question : ").partition(" reference : ")
            assert facts_of(trace) == facts_of(context)
            chain, (parsed) = parse_question(question), parse_trace(trace)
            assert len(parsed.steps) == len(chain.operations) and parsed.well_formed
            assert parsed.answer is not None and context.endswith(f"so {parsed.answer.body}")
            own += "=" in trace
            both += 1
    assert abs(own / both - 0.5) < 0.07


def test_facts_of_contexts_are_random() -> None:
    """So that following a context teaches no fact: true and wrong results at chance, a tenth each."""
    wrong = wrong_facts(0)
    stated = [f for prompt, text in documents(1500, 1.0) if " : " in prompt[11:] for f in facts_of(text)]
    true = sum(result == apply(*fact) for fact, result in stated) / len(stated)
    habitual = [result == wrong[fact] for fact, result in stated if fact in wrong]
    assert abs(true - 0.1) < 0.02 and abs(sum(habitual) / len(habitual) - 0.1) < 0.04


def test_a_context_states_each_fact_once_and_for_all() -> None:
    for prompt, trace in documents(1500, 1.0):
        if " : " in prompt[11:]:
            table: dict[Fact, int] = {}
            assert all(table.setdefault(fact, result) == result for fact, result in facts_of(trace))


def test_the_critics_documents_hold_the_exact_critique_of_their_attempt() -> None:
    rng = random.Random(2)
    for _ in range(100):
        messages, critique = critic_document(rng)
        question, _, rest = messages[0]["content"].removeprefix("question : ").partition(" reference : ")
        reference, _, attempt = rest.partition(" attempt : ")
        assert critique == exact_critique(question, attempt)
        chain = parse_question(question)
        assert reference.endswith(f"so {chain.results()[-1]}")


def test_every_word_of_a_document_is_known_to_its_tokenizer() -> None:
    rng = random.Random(3)
    solver, critic = build_tokenizer(), build_tokenizer(critic=True)
    for prompt, response in documents(1500, 1.0):
        assert solver.unk_token_id not in solver(f"{prompt} {response}", add_special_tokens=False)["input_ids"]
    for _ in range(150):
        messages, critique = critic_document(rng)
        attempt_apart = messages[0]["content"].partition(" attempt : ")[0]  # attempts hold corrupted words
        assert critic.unk_token_id not in critic(f"{attempt_apart} {critique}", add_special_tokens=False)["input_ids"]
