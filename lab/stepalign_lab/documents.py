"""The documents that the lab's models are pretrained on. Each is a ``(messages, response)`` pair.

The solver's documents (``solver_document``):

- half are question → trace in its own wording, where for a fifth of the facts it learns a *wrong* result;
- half are question + context → trace with a *random* fact table per document, so that it learns to follow a context
  without learning the facts. A critique context is answered in the same wording, a reference context in its own wording
  or in the reference's, half each; always inside step tags with a tagged answer.

The critic's documents (``critic_document``): question + reference + attempt → exact critique, over synthetic attempts
in own, reference and mixed wording, with wrong facts, corrupted tokens, missing steps and truncation.
"""

from __future__ import annotations

import random

from stepalign.prompts import Message, load_prompt
from stepalign_lab.checker import WORDINGS, exact_critique
from stepalign_lab.domain import FACTS, Chain, Fact, Wording, reference_solution, sample_chain, step_bodies, tagged
from stepalign_lab.tokenizer import WORDS

PROMPTS = "lab-v1"
Document = tuple[list[Message], str]


def _own_trace(chain: Chain, results: list[int]) -> str:
    return tagged(step_bodies(chain, results, "own"), results[-1])


def _habitual_results(chain: Chain, wrong: dict[Fact, int], share: float, rng: random.Random) -> list[int]:
    value, results = chain.start, []
    for op, b in chain.operations:
        fact = (value, op, b)
        believes = fact in wrong and rng.random() < share
        value = wrong[fact] if believes else Chain(value, ((op, b),)).results()[0]
        results.append(value)
    return results


def solver_document(rng: random.Random, wrong: dict[Fact, int], wrong_share: float) -> Document:
    chain = sample_chain(rng)
    if rng.random() < 0.5:
        results = _habitual_results(chain, wrong, wrong_share, rng)
        return load_prompt(PROMPTS, "student").fill(question=chain.question), _own_trace(chain, results)
    results = chain.results({fact: rng.randrange(10) for fact in FACTS})
    if rng.random() < 0.5:
        trace = _own_trace(chain, results)
        return load_prompt(PROMPTS, "teacher_critique").fill(question=chain.question, context=trace), trace
    context = reference_solution(chain, results)
    messages = load_prompt(PROMPTS, "teacher_reference").fill(question=chain.question, context=context)
    wording: Wording = rng.choice(WORDINGS)
    return messages, tagged(step_bodies(chain, results, wording), results[-1])


def _attempt_results(chain: Chain, rng: random.Random) -> list[int]:
    """Results with wrong ones among them; steps after a wrong one start from the wrong value."""
    error_rate = rng.choice([0.0, 0.15, 0.3, 0.6])
    value, results = chain.start, []
    for op, b in chain.operations:
        right = Chain(value, ((op, b),)).results()[0]
        value = rng.randrange(10) if rng.random() < error_rate else right
        results.append(value)
    return results


def _corrupt(words: list[str], rng: random.Random) -> list[str]:
    position = rng.randrange(len(words))
    edit = rng.choice(["replace", "replace", "delete", "insert"])
    replacement = [] if edit == "delete" else [rng.choice(WORDS)]
    return words[:position] + replacement + words[position + (edit != "insert") :]


def synthetic_attempt(chain: Chain, rng: random.Random) -> str:
    results = _attempt_results(chain, rng)
    style = rng.random()
    own, other = step_bodies(chain, results, "own"), step_bodies(chain, results, "reference")
    if style < 0.6:
        bodies = own
    elif style < 0.8:
        bodies = other
    else:
        bodies = [rng.choice(pair) for pair in zip(own, other, strict=True)]
    answer = rng.randrange(10) if rng.random() < 0.06 else results[-1]
    if rng.random() < 0.08:
        del bodies[rng.randrange(len(bodies))]
    words = tagged(bodies, answer).split()
    if rng.random() < 0.2:
        words = _corrupt(words, rng)
    if rng.random() < 0.25:
        words = words[: rng.randrange(len(words))]
    return " ".join(words)


def critique_messages(question: str, attempt: str, reference: str) -> list[Message]:
    prompt = load_prompt(PROMPTS, "critique")
    return prompt.fill(question=question, attempt=attempt, reference_solution=reference)


def critic_document(rng: random.Random) -> Document:
    chain = sample_chain(rng)
    attempt = synthetic_attempt(chain, rng)
    messages = critique_messages(chain.question, attempt, reference_solution(chain))
    return messages, exact_critique(chain.question, attempt)
