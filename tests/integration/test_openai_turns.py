"""Aligned decoding with servers that have OpenAI's protocol: the real service before a server that says what a test
wants."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from stepalign.commands.critique import _show
from stepalign.types import CritiqueRequest, CritiqueResponse, Forced, Verdict
from stepalign_critic.backends.openai import OpenAIBackend
from stepalign_critic.service import AlignedDecoding, CriticService
from stepalign_run.config import CriticServerSection
from support.upstream import Reply, Upstream, completion, upstream

STEPS = ["3 + 4 = 7", "7 * 2 = 15", "The answer is 15."]
REQUEST = CritiqueRequest(question="3 + 4 * 2", steps=STEPS, reference_solution="Twice 7 is 14.", answer="14")
WRITTEN = "<step_2>7 * 2 = 14</step_2>\n<step_3>The answer is 14.</step_3>\n<answer>14</answer>"


def logprobs(**likely: float) -> dict[str, Any]:
    """What a server tells of the first token."""
    tops = [{"token": token, "logprob": math.log(p)} for token, p in likely.items()]
    return {"content": [{**tops[0], "top_logprobs": tops}]}


def asked(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]


def judging(p_wrong: list[float], written: str = WRITTEN) -> Callable[[dict[str, Any]], Reply]:
    """A server whose model finds the steps wrong with these probabilities, and writes ``written``."""

    def answer(body: dict[str, Any]) -> Reply:
        said = asked(body)
        if not said.startswith("Step "):
            return Reply(completion(written))
        p = p_wrong[int(said.split()[1].rstrip(":")) - 1]
        made = completion("right" if p < 0.5 else "wrong")
        made["choices"][0]["logprobs"] = logprobs(right=1 - p, wrong=p, other=1e-9)
        return Reply(made)

    return answer


def critique(served: Upstream, request: CritiqueRequest = REQUEST, **settings: Any) -> CritiqueResponse:
    async def main() -> CritiqueResponse:
        with upstream(served) as url:
            section = CriticServerSection(
                backend="openai", prompts="chat-v2", openai={"base_url": url, **settings}, max_new_tokens=500
            )
            backend = OpenAIBackend(section)
            service = CriticService(backend, section.prompts, aligned=AlignedDecoding(section.max_new_tokens))
            service.lifecycle.begin()
            while service.lifecycle.unreadiness() is not None:
                assert service.lifecycle.failure is None, service.lifecycle.failure
                await asyncio.sleep(0.01)
            served.asked.clear()
            try:
                return await service.critique(request)
            finally:
                await service.lifecycle.end()

    return asyncio.run(main())


@pytest.mark.parametrize("grammar", ["none", "grammar", "structured_outputs"])
def test_each_step_is_asked_for_and_the_likeliest_is_corrected(grammar: str) -> None:
    served = Upstream(judging([0.1, 0.3, 0.2]))
    found = critique(served, grammar=grammar)
    assert found.critique is not None, found.failure
    assert (found.critique.verdict, found.critique.first_error_step) == (Verdict.INCORRECT, 2)
    assert [step.body for step in found.critique.steps] == ["3 + 4 = 7", "7 * 2 = 14", "The answer is 14."]
    assert found.p_wrong == pytest.approx([0.1, 0.3, 0.2])
    assert found.forced == [Forced.ANSWER, Forced.ERROR]
    *words, last = served.asked
    assert [asked(body).partition(": ")[2] for body in words] == STEPS
    for body in words:
        assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 20, 2)
        assert "grammar" not in body and "structured_outputs" not in body
    # The conversation so far stands before each question: a server's prefix cache serves it.
    assert words[2]["messages"][: len(words[1]["messages"])] == words[1]["messages"]
    assert last["messages"][-2] == {"role": "assistant", "content": "wrong"}
    sent = {"grammar": last.get("grammar"), "structured_outputs": last.get("structured_outputs", {}).get("grammar")}
    assert [name for name, text in sent.items() if text] == ([] if grammar == "none" else [grammar])
    for text in filter(None, sent.values()):
        assert text.startswith('root ::= "<step_2>"') and "14</answer>" in text


@pytest.mark.parametrize(("answer", "told"), [("14", True), ("15", False), (None, False)])
def test_only_an_attempt_whose_answer_is_wrong_is_said_to_hold_a_mistake(answer: str | None, told: bool) -> None:
    served = Upstream(judging([0.1, 0.3, 0.2]))
    critique(served, REQUEST.model_copy(update={"answer": answer}))
    for body in served.asked:
        first = body["messages"][1]["content"]
        assert ("final answer is not 14, so there is a mistake" in first) is told
        assert first.endswith("\n\nStep 0: I read the problem.")


def test_a_right_attempt_costs_a_word_a_step() -> None:
    served = Upstream(judging([0.1, 0.9, 0.2]))
    request = REQUEST.model_copy(update={"answer": "15"})
    found = critique(served, request)
    assert found.critique is not None and found.critique.verdict is Verdict.CORRECT
    assert found.forced == [Forced.NO_ERROR]
    assert len(served.asked) == 3


@pytest.mark.parametrize(
    "written",
    [
        "7 * 2 = 14</step_2>\n<answer>14</answer>",
        "7 * 2 = 14",
        "Sure: <step_2>7 * 2 = 14</step_2>",
        "<think>hm</think>\n<step_2>7 * 2 = 14</step_2> <answer>15</answer>",
    ],
)
def test_what_a_server_without_grammars_writes_is_read_leniently(written: str) -> None:
    found = critique(Upstream(judging([0.1, 0.9, 0.2], written)))
    if "15</answer>" in written:
        assert found.failure is not None and found.failure.reason == "answer_mismatch"
        return
    assert found.critique is not None, found.failure
    assert [(step.body, step.status) for step in found.critique.steps][1:] == [("7 * 2 = 14", "corrected")]
    assert found.critique.answer == "14"


def test_a_server_that_tells_no_probabilities_is_taken_at_its_word() -> None:
    def answer(body: dict[str, Any]) -> Reply:
        said = asked(body)
        if said.startswith("Step "):
            return Reply(completion("Wrong." if said.startswith("Step 2") else "Right."))
        return Reply(completion(WRITTEN))

    served = Upstream(answer)
    found = critique(served, logprobs=False)
    assert found.critique is not None and found.critique.first_error_step == 2
    assert found.p_wrong is None
    assert all("logprobs" not in body for body in served.asked)


def test_tokens_that_begin_a_word_count_for_it() -> None:
    def answer(body: dict[str, Any]) -> Reply:
        said = asked(body)
        if not said.startswith("Step "):
            return Reply(completion(WRITTEN))
        made = completion("Wr")
        tops = {" wr": 0.3, "Wrong": 0.3, "R": 0.2, "maybe": 0.2} if said.startswith("Step 2") else {"right": 1.0}
        made["choices"][0]["logprobs"] = {
            "content": [
                {
                    "token": "x",
                    "logprob": -9.0,
                    "top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in tops.items()],
                }
            ]
        }
        return Reply(made)

    found = critique(Upstream(answer))
    assert found.p_wrong is not None
    assert found.p_wrong[1] == pytest.approx(0.75)
    assert max(found.p_wrong[0], found.p_wrong[2]) < 1e-9


def test_the_command_says_what_the_known_answer_settled() -> None:
    console = Console(width=100, record=True)
    _show(console, REQUEST, critique(Upstream(judging([0.1, 0.3, 0.2]))))
    assert "settled    by the known answer: the critique's answer, that there is an error" in console.export_text()
