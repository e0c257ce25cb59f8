"""Aligned decoding with servers that have OpenAI's protocol: the real service before a server that says what a test
wants."""

from __future__ import annotations

import asyncio
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from rich.console import Console

from stepalign.commands.critique import _show
from stepalign.types import CritiqueRequest, CritiqueResponse, Forced, Verdict
from stepalign_critic.backends.openai import OpenAIBackend
from stepalign_critic.errors import EngineError, EngineTimeoutError, UnsupportedRequestError
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
    (found,) = asyncio.run(_ask_all(served, [request], {}, settings))
    if isinstance(found, Exception):
        raise found
    return found


async def _ask_all(
    served: Upstream,
    requests: Sequence[CritiqueRequest],
    options: dict[str, Any],
    settings: dict[str, Any],
    threshold: float = 0.5,
) -> list[Any]:
    """The responses of a critic before ``served``, or its errors, to requests that come at the same time."""
    with upstream(served) as url:
        section = CriticServerSection(
            backend="openai", prompts="chat-v2", openai={"base_url": url, **settings}, max_new_tokens=500, **options
        )
        backend = OpenAIBackend(section)
        aligned = AlignedDecoding(section.max_new_tokens, threshold=threshold)
        service = CriticService(backend, section.prompts, aligned=aligned)
        service.lifecycle.begin()
        while service.lifecycle.unreadiness() is not None:
            assert service.lifecycle.failure is None, service.lifecycle.failure
            await asyncio.sleep(0.01)
        served.asked.clear()
        try:
            return await asyncio.gather(*map(service.critique, requests), return_exceptions=True)
        finally:
            await service.lifecycle.end()


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
    words.sort(key=lambda body: len(body["messages"]))
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


@pytest.mark.parametrize("threshold", [0.1, 0.5])
@pytest.mark.parametrize(("answer", "place"), [(None, None), ("14", 3)])
def test_a_model_that_says_neither_word_finds_no_step_wrong(
    answer: str | None, place: int | None, threshold: float
) -> None:
    """Beside a wrong answer the step that states it is wrong: that is all that is known."""
    written = "<step_3>The answer is 14.</step_3>\n<answer>14</answer>"
    served = Upstream(lambda body: Reply(completion("who knows" if asked(body).startswith("Step ") else written)))
    request = REQUEST.model_copy(update={"answer": answer})
    (found,) = asyncio.run(_ask_all(served, [request], {}, {}, threshold))
    assert found.critique is not None, found.failure
    assert (found.critique.first_error_step, found.p_wrong) == (place, None)


@pytest.mark.parametrize(
    ("text", "bodies"),
    [
        ("<step_2>7 * 2 = 1", ["7 * 2 = 1"]),
        ("<step_2>7 * 2 = 14</st", ["7 * 2 = 14"]),
        ("<step_2>7 * 2 = 14</step_2>\n<st", ["7 * 2 = 14"]),
        ("<step_2>7 * 2 = 14</step_2>\n<step_3>", ["7 * 2 = 14"]),
        ("<step_2>7 * 2 = 14</step_2>\n<step_3>So it", ["7 * 2 = 14", "So it"]),
        ("<step_2>7 * 2 = 14</step_2>\n<answer>1", ["7 * 2 = 14"]),
        ("<step_2>7 * 2 = 14</step_2>\n<answer>14</answ", ["7 * 2 = 14"]),
    ],
)
def test_a_budget_that_ends_amid_a_correction_is_its_bound(text: str, bodies: list[str]) -> None:
    """Of a grammar that counts characters; the known answer follows. Without one nothing can."""

    def answer(body: dict[str, Any]) -> Reply:
        is_step = asked(body).startswith("Step ")
        return judging([0.1, 0.9, 0.2])(body) if is_step else Reply(completion(text, "length"))

    found = critique(Upstream(answer), grammar="grammar")
    assert found.critique is not None, found.failure
    assert [step.body for step in found.critique.steps] == ["3 + 4 = 7", *bodies]
    assert found.critique.answer == "14" and Forced.STEP_BOUND in found.forced
    unknown = critique(Upstream(answer), REQUEST.model_copy(update={"answer": None}), grammar="grammar")
    assert unknown.failure is not None and unknown.failure.reason == "truncated"


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


def critic_of(served: Upstream, max_batch: int, *requests: CritiqueRequest, **settings: Any) -> list[Any]:
    """What a critic that may have ``max_batch`` requests open says to all requests at once."""
    return asyncio.run(_ask_all(served, requests, {"max_batch": max_batch}, settings))


def long_attempt(steps: int) -> CritiqueRequest:
    bodies = [f"{n} + 1 = {n + 1}" for n in range(1, steps)] + ["The answer is 14."]
    return REQUEST.model_copy(update={"steps": bodies})


class Watched:
    """A model that calls every step right, ``seconds`` after it is asked; counts what is open at the same time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.open = self.most_open = 0
        self.alone: list[bool] = []
        """For each question about a step in the order they came, whether no other was open."""
        self._lock = threading.Lock()

    def __call__(self, body: dict[str, Any]) -> Reply:
        if not asked(body).startswith("Step "):
            return Reply(completion(WRITTEN))
        with self._lock:
            self.open += 1
            self.alone.append(self.open == 1)
            self.most_open = max(self.most_open, self.open)
        self.wait()
        with self._lock:
            self.open -= 1
        return judging([0.1] * 100)(body)

    def wait(self) -> None:
        time.sleep(self.seconds)


def test_the_steps_are_asked_at_the_same_time_after_the_one_that_holds_all_the_others() -> None:
    class Meeting(Watched):
        """All questions but the first are answered when the last of them has come."""

        def __init__(self) -> None:
            super().__init__()
            self.barrier = threading.Barrier(5)

        def wait(self) -> None:
            if len(self.alone) > 1:
                self.barrier.wait(20)

    model = Meeting()
    served = Upstream(model)
    (found,) = critic_of(served, 8, long_attempt(6))
    assert found.critique is not None and found.critique.verdict is Verdict.CORRECT
    assert (model.alone[0], model.most_open) == (True, 5)
    numbers = [int(asked(body).split()[1].rstrip(":")) for body in served.asked]
    assert numbers[0] == 6 and sorted(numbers) == [1, 2, 3, 4, 5, 6]
    whole = served.asked[0]["messages"]
    assert all(body["messages"] == whole[: len(body["messages"])] for body in served.asked)


def test_all_critiques_together_have_no_more_requests_open_than_the_largest_batch() -> None:
    model = Watched(0.02)
    found = critic_of(Upstream(model), 3, *[long_attempt(8)] * 3)
    assert all(one.critique is not None for one in found)
    assert model.most_open == 3


def test_a_long_attempt_does_not_keep_a_short_one_waiting_for_all_its_steps() -> None:
    served = Upstream(Watched(0.01))
    short = REQUEST.model_copy(update={"question": "the short one", "answer": "15"})
    critic_of(served, 2, long_attempt(40), short)
    mine = [i for i, body in enumerate(served.asked) if "the short one" in str(body["messages"])]
    assert len(mine) == 3 and mine[-1] < 25, mine


def test_one_time_limit_holds_for_all_requests_of_a_critique() -> None:
    (found,) = critic_of(Upstream(Watched(0.6)), 1, long_attempt(12), timeout_seconds=4.0)
    assert isinstance(found, EngineTimeoutError), found
    assert "critic.openai.timeout_seconds" in str(found)


def test_after_a_failure_no_further_step_is_asked_for() -> None:
    def answer(body: dict[str, Any]) -> Reply:
        if asked(body).startswith("Step 9:"):
            return Reply({"error": {"message": "out of memory"}}, 500)
        waits = asked(body).startswith("Step ") and not asked(body).startswith("Step 20:")
        return Reply(judging([0.1] * 100)(body).body, pause=30.0 if waits else 0.0)

    served = Upstream(answer)
    begin = time.monotonic()
    (found,) = critic_of(served, 12, long_attempt(20))
    assert isinstance(found, EngineError) and "out of memory" in str(found)
    assert time.monotonic() - begin < 20
    assert len(served.asked) == 13


def test_a_wrong_result_that_nothing_announces_convicts_a_step() -> None:
    steps = ["3 + 4 = 7", "7 * 2 = 15", "So she has 15 apples."]
    found = critique(Upstream(judging([0.1, 0.3, 0.2])), REQUEST.model_copy(update={"steps": steps}))
    assert found.critique is not None, found.failure
    assert (found.critique.verdict, found.critique.first_error_step) == (Verdict.INCORRECT, 2)
    assert found.forced == [Forced.ANSWER, Forced.ERROR]


def test_an_attempt_without_an_answer_is_called_wrong_where_the_model_finds_it_wrong() -> None:
    steps = ["3 + 4 = 7", "7 * 2 = 15", "She has 15 apples."]
    found = critique(Upstream(judging([0.1, 0.9, 0.2])), REQUEST.model_copy(update={"steps": steps}))
    assert found.critique is not None, found.failure
    assert (found.critique.verdict, found.critique.first_error_step) == (Verdict.INCORRECT, 2)


@pytest.mark.parametrize("grammar", ["grammar", "structured_outputs"])
def test_a_known_answer_with_a_nul_is_refused_where_a_grammar_would_hold_it(grammar: str) -> None:
    request = REQUEST.model_copy(update={"answer": "14\x00"})
    with pytest.raises(UnsupportedRequestError, match=r"U\+0000, .*send it without"):
        critique(Upstream(judging([0.1, 0.3, 0.2])), request, grammar=grammar)


@pytest.mark.parametrize(("short_of_the_bound", "cut"), [(0, [Forced.STEP_BOUND]), (2, [])])
@pytest.mark.parametrize("attempt", ["wrong", "cut off"])
def test_a_step_that_its_bound_has_cut_is_told_from_one_that_ended(
    attempt: str, short_of_the_bound: int, cut: list[Forced]
) -> None:
    def answer(body: dict[str, Any]) -> Reply:
        if "rest" not in body.get("grammar", ""):
            return judging([0.1, 0.9, 0.2] if attempt == "wrong" else [0.1, 0.1])(body)
        most = int(re.findall(r"rest\d+ ::= .*\{0,(\d+)\}", body["grammar"])[0]) + 1 - short_of_the_bound
        return Reply(completion(f"<step_2>{'7 * 2 =' if attempt == 'cut off' else ''}{'x' * most}</step_2>{END}"))

    END = "\n<answer>14</answer>"
    cut_off = CritiqueRequest(question="3 + 4 * 2", attempt="<step_1>3 + 4 = 7</step_1><step_2>7 * 2 =", answer="14")
    served = Upstream(answer)
    found = critique(served, REQUEST if attempt == "wrong" else cut_off, grammar="grammar")
    assert found.critique is not None, found.failure
    assert found.critique.steps[1].body.endswith("xxx")
    assert found.forced == [Forced.ANSWER, *cut]
    console = Console(width=100, record=True)
    _show(console, REQUEST, found)
    assert ("cut        at the most that it may take: a step" in console.export_text()) is bool(cut)


def test_the_command_says_what_the_known_answer_settled() -> None:
    console = Console(width=100, record=True)
    _show(console, REQUEST, critique(Upstream(judging([0.1, 0.3, 0.2]))))
    assert "settled    by the known answer: the critique's answer, that there is an error" in console.export_text()
