"""The critic service around fake backends: prompts, thinking, validation, states."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from stepalign.critique.splitting import AnswerRule, SplitRule
from stepalign.errors import ConfigError, PromptError, PromptTooLongError
from stepalign.prompts import Message, Prompt
from stepalign.types import (
    CriticIdentity,
    Critique,
    CritiqueFailure,
    CritiqueMode,
    CritiqueRequest,
    CritiqueResponse,
    FailureReason,
    FinishReason,
    Verdict,
)
from stepalign_critic.backends.base import Generation, RenderedPrompt
from stepalign_critic.backends.program import ProgramBackend
from stepalign_critic.errors import BackendDiedError, EngineError, NotReadyError, UnsupportedRequestError
from stepalign_critic.lifecycle import State
from stepalign_critic.service import CriticService, read_answer
from stepalign_lab.checker import exact_critique

ATTEMPT = "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 9 </step_2> <answer> 9 </answer>"
COPY = exact_critique("3 + 4 * 7", ATTEMPT)
REQUEST = CritiqueRequest(question="3 + 4 * 7", attempt=ATTEMPT, answer="9")


class FakeBackend:
    """Answers with ``write(prompt)``; ``prompts`` holds what it was asked."""

    name = "fake"
    recovers = True

    def __init__(self, write: Callable[[RenderedPrompt], str], finish: FinishReason = FinishReason.STOP) -> None:
        self._write = write
        self._finish = finish
        self.prompts: list[RenderedPrompt] = []

    def identity(self, prompt_version: str) -> CriticIdentity:
        return CriticIdentity(model="m", weights_revision="w", prompt_version=prompt_version, backend=self.name)

    async def start(self) -> None: ...

    def render(self, messages: list[Message]) -> list[int]:
        return [len(message["content"]) for message in messages]

    async def generate(self, prompt: RenderedPrompt) -> Generation:
        self.prompts.append(prompt)
        return Generation(self._write(prompt), self._finish, prompt_tokens=11, completion_tokens=7)

    def expected_wait_seconds(self) -> None:
        return None

    def healthy(self) -> bool:
        return True

    async def stop(self) -> None: ...


def critique(
    backend: FakeBackend | ProgramBackend, request: CritiqueRequest = REQUEST, prompts: str = "lab-v1"
) -> CritiqueResponse:
    async def main() -> CritiqueResponse:
        service = CriticService(backend, prompts)
        service.lifecycle.begin()
        while service.lifecycle.state is State.LOADING:
            await asyncio.sleep(0)
        try:
            return await service.critique(request)
        finally:
            await service.lifecycle.end()

    return asyncio.run(main())


def failure_of(text: str, finish: FinishReason = FinishReason.STOP) -> CritiqueFailure:
    outcome = read_answer(Generation(text, finish, 0, 0), REQUEST.split().tagged, REQUEST.answer)
    assert isinstance(outcome, CritiqueFailure)
    return outcome


def test_an_unchanged_copy_is_a_critique_with_identity_and_usage() -> None:
    response = critique(FakeBackend(lambda prompt: exact_critique("3 + 4 * 7", prompt.request.split().tagged)))
    assert response.critique is not None and response.failure is None
    assert response.critique.verdict is Verdict.CORRECT
    assert response.critique.alignment.copied_steps == 2
    assert response.critic.model_dump() == {
        "model": "m",
        "weights_revision": "w",
        "prompt_version": "lab-v1",
        "backend": "fake",
        "settings": None,
    }
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (11, 7)


def test_every_response_has_its_own_id() -> None:
    backend = FakeBackend(lambda _: COPY)
    ids = {critique(backend).id for _ in range(3)}
    assert len(ids) == 3
    assert all(name.startswith("crq_") and len(name) == 36 for name in ids)


def test_one_changed_character_of_a_copied_step_is_a_failure() -> None:
    response = critique(FakeBackend(lambda _: COPY.replace("3 + 4 = 7", "3 + 4 = 8")))
    assert response.critique is None and response.failure is not None
    assert response.failure.reason is FailureReason.COPIED_STEP_ALTERED
    assert "step 1" in response.failure.detail


def test_the_known_answer_of_the_request_is_held_against_the_critique() -> None:
    response = critique(FakeBackend(lambda _: COPY), REQUEST.model_copy(update={"answer": "4"}))
    assert response.failure is not None
    assert response.failure.reason is FailureReason.VERDICT_DISAGREES


def test_thinking_is_cut_through_its_last_closing_tag() -> None:
    text = f"<think> <step_1> no </step_1> </think> and so </think> {COPY}"
    outcome = read_answer(Generation(text, FinishReason.STOP, 0, 0), REQUEST.split().tagged, REQUEST.answer)
    assert isinstance(outcome, Critique)
    assert "no" not in outcome.text


def test_thinking_that_the_chat_template_opened_is_cut() -> None:
    assert isinstance(
        read_answer(Generation(f"hm </think>{COPY}", FinishReason.STOP, 0, 0), REQUEST.split().tagged, REQUEST.answer),
        Critique,
    )


@pytest.mark.parametrize("finish", list(FinishReason))
def test_thinking_that_never_ends_is_truncated(finish: FinishReason) -> None:
    failure = failure_of(f"<think> {COPY}", finish)
    assert failure.reason is FailureReason.TRUNCATED
    assert failure.text.startswith("<think>")


THINKING = {"attempt": None, "steps": ["<think>3 + 4 = 7\n7 * 7 = 9</think>", "The answer is 9."]}


@pytest.mark.parametrize("thought", ["", "<think> hm </think>", "hm </think> no </think>"])
def test_an_attempt_that_thinks_can_be_copied(thought: str) -> None:
    request = REQUEST.model_copy(update=THINKING)
    split = request.split()
    copied = split.tagged.replace("</step_1>", "</step_1><copied/>").replace("</step_2>", "</step_2><copied/>")
    answer = f"{thought}{copied}<verdict>correct</verdict>"
    outcome = read_answer(Generation(answer, FinishReason.STOP, 0, 0), split.tagged, "9")
    assert isinstance(outcome, Critique), outcome
    assert outcome.verdict is Verdict.CORRECT


def test_an_attempt_that_thinks_excuses_no_thinking_without_end() -> None:
    attempt = REQUEST.model_copy(update=THINKING).split().tagged
    outcome = read_answer(Generation("<think> hm", FinishReason.STOP, 0, 0), attempt, "9")
    assert isinstance(outcome, CritiqueFailure) and outcome.reason is FailureReason.TRUNCATED


def test_a_generation_over_its_budget_is_truncated_even_when_it_reads_well() -> None:
    assert failure_of(COPY, FinishReason.LENGTH).reason is FailureReason.TRUNCATED


def test_text_without_the_grammar_is_unparseable() -> None:
    assert failure_of("looks fine to me").reason is FailureReason.UNPARSEABLE


def test_a_missing_reference_solution_is_written_as_none() -> None:
    service = CriticService(FakeBackend(lambda _: COPY), "lab-v1")
    assert service.messages(REQUEST)[0]["content"] == f"question : 3 + 4 * 7 reference : none attempt : {ATTEMPT}"


def test_the_backend_gets_request_messages_and_token_ids() -> None:
    backend = FakeBackend(lambda _: COPY)
    critique(backend)
    (prompt,) = backend.prompts
    assert prompt.request == REQUEST
    assert prompt.token_ids == [len(prompt.messages[0]["content"])]


def test_the_nonce_depends_on_the_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = Prompt("critique", "test-v1", (("user", "{{nonce}} {{attempt}}"),))
    monkeypatch.setattr("stepalign_critic.service.load_prompt", lambda *_: prompt)
    service, again = (CriticService(FakeBackend(lambda _: COPY), "test-v1") for _ in range(2))
    nonce = service.messages(REQUEST)[0]["content"].split()[0]
    assert len(nonce) == 16 and int(nonce, 16) >= 0
    assert again.messages(REQUEST) == service.messages(REQUEST)
    other = service.messages(REQUEST.model_copy(update={"question": "3 + 4 * 8"}))
    assert other[0]["content"].split()[0] != nonce
    # What the critic does not see changes no prompt.
    unseen = REQUEST.model_copy(update={"mode": CritiqueMode.OMISSION, "answer": None})
    assert service.messages(unseen) == service.messages(REQUEST)


def test_a_prompt_with_a_field_that_no_request_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = Prompt("critique", "test-v1", (("user", "{{attempt}} {{mood}}"),))
    monkeypatch.setattr("stepalign_critic.service.load_prompt", lambda *_: prompt)
    with pytest.raises(PromptError, match="mood"):
        CriticService(FakeBackend(lambda _: COPY), "test-v1")


def test_a_checkers_value_error_is_unsupported_and_others_engine_errors() -> None:
    def broken(question: str, attempt: str) -> str:
        raise KeyError(question)

    with pytest.raises(UnsupportedRequestError, match="hello"):
        critique(ProgramBackend("lab", exact_critique, "r"), REQUEST.model_copy(update={"question": "hello"}))
    with pytest.raises(EngineError, match="KeyError"):
        critique(ProgramBackend("lab", broken, "r"))


def test_a_critic_that_loads_or_stops_takes_no_request() -> None:
    async def main() -> list[str]:
        service = CriticService(FakeBackend(lambda _: COPY), "lab-v1")
        codes: list[str] = []
        for act in (lambda: None, service.lifecycle.stop):
            act()
            with pytest.raises(NotReadyError) as refused:
                await service.critique(REQUEST)
            codes.append(refused.value.code)
        return codes

    assert asyncio.run(main()) == ["loading", "stopping"]


def test_a_backend_that_does_not_start_is_reported_once_with_its_reason() -> None:
    class Broken(FakeBackend):
        async def start(self) -> None:
            raise ConfigError("no weights")

    async def main() -> None:
        service, calls = CriticService(Broken(lambda _: COPY), "lab-v1"), list[str]()
        service.lifecycle.on_failure = lambda: calls.append("failed")
        service.lifecycle.begin()
        while service.lifecycle.state is State.LOADING:
            await asyncio.sleep(0)
        with pytest.raises(NotReadyError, match="no weights"):
            await service.critique(REQUEST)
        assert calls == ["failed"]
        assert isinstance(service.lifecycle.failure, ConfigError)
        await service.lifecycle.end()

    asyncio.run(main())


@pytest.mark.parametrize("recovers", [True, False])
def test_a_backend_that_dies_ends_the_process_unless_it_recovers(
    recovers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mortal(FakeBackend):
        alive = True

        def healthy(self) -> bool:
            return self.alive

    async def main() -> None:
        backend = Mortal(lambda _: COPY)
        backend.recovers = recovers
        service, calls = CriticService(backend, "lab-v1"), list[str]()
        service.lifecycle.on_failure = lambda: calls.append("failed")
        service.lifecycle.begin()
        while service.lifecycle.state is State.LOADING:
            await asyncio.sleep(0)
        backend.alive = False
        await asyncio.sleep(0.1)
        assert calls == ([] if recovers else ["failed"])
        with pytest.raises(NotReadyError) as refused:
            await service.critique(REQUEST)
        assert refused.value.code == ("unhealthy" if recovers else "failed")
        backend.alive = True
        if recovers:
            assert (await service.critique(REQUEST)).critique is not None
        else:
            assert isinstance(service.lifecycle.failure, BackendDiedError)
            assert service.lifecycle.failure.exit_code == os.EX_TEMPFAIL
        await service.lifecycle.end()

    monkeypatch.setattr("stepalign_critic.lifecycle._LOOK_SECONDS", 0.01)
    asyncio.run(main())


UNTAGGED = "1. 3 + 4 = 7\n2. 7 * 7 = 8\nSo the answer is 8."


def test_an_untagged_attempt_is_split_and_spans_lead_into_what_was_sent() -> None:
    request = CritiqueRequest(question="3 + 4 * 7", attempt=UNTAGGED, answer="9")
    text = (
        "<step_1>3 + 4 = 7</step_1><copied/> <step_2>7 * 7 = 9</step_2><corrected/> <answer>9</answer>"
        "<verdict>incorrect</verdict>"
    )
    seen: list[str] = []

    def answer(prompt: RenderedPrompt) -> str:
        seen.extend(message["content"] for message in prompt.messages)
        return text

    response = critique(FakeBackend(answer), request)
    tagged = "<step_1>3 + 4 = 7</step_1>\n<step_2>7 * 7 = 8\nSo the answer is 8.</step_2>\n<answer>8</answer>"
    assert any(tagged in content for content in seen)
    assert (response.attempt.rule, response.attempt.answer_rule) == (SplitRule.NUMBERED_LINES, AnswerRule.PHRASE)
    assert response.attempt.tagged == tagged
    assert [UNTAGGED[slice(*span)] for span in response.attempt.steps] == [
        "3 + 4 = 7",
        "7 * 7 = 8\nSo the answer is 8.",
    ]
    assert response.critique is not None and response.critique.alignment.first_difference is not None
    assert UNTAGGED[slice(*response.critique.alignment.first_difference)] == "7 * 7 = 8\nSo the answer is 8."
    assert response.context == response.critique.text


def test_sent_steps_are_read_as_steps() -> None:
    request = CritiqueRequest(question="3 + 4 * 7", steps=["3 + 4 = 7", "7 * 7 = 9", "#### 9"], answer="9")
    copies = [f"<step_{i}>{step}</step_{i}><copied/>" for i, step in enumerate(request.steps or [], start=1)]
    text = f"{''.join(copies)}<answer>9</answer><verdict>correct</verdict>"
    response = critique(FakeBackend(lambda _: text), request)
    assert response.attempt.rule is SplitRule.STEPS
    assert len(response.attempt.steps) == 3
    assert response.critique is not None and response.critique.verdict is Verdict.CORRECT


def test_a_tagged_attempt_is_not_sent_back() -> None:
    assert critique(FakeBackend(lambda _: COPY)).attempt.tagged is None


def test_each_mode_has_its_context_of_the_same_critique() -> None:
    attempt = "3 + 4 = 7\n7 * 7 = 8\n#### 8"
    text = (
        "<step_1>3 + 4 = 7</step_1><copied/>\n<step_2>7 * 7 = 9</step_2><corrected/>\n<answer>9</answer>"
        "<verdict>incorrect</verdict>"
    )
    responses = {
        mode: critique(
            FakeBackend(lambda _: text), CritiqueRequest(question="3 + 4 * 7", attempt=attempt, answer="9", mode=mode)
        )
        for mode in CritiqueMode
    }
    step_aligned = responses[CritiqueMode.STEP_ALIGNED].critique
    assert all(response.critique == step_aligned for response in responses.values())
    rest = "<step_2>7 * 7 = 9</step_2>\n<answer>9</answer>"
    assert {mode: response.context for mode, response in responses.items()} == {
        CritiqueMode.STEP_ALIGNED: f"<step_1>3 + 4 = 7</step_1>\n{rest}",
        CritiqueMode.FULL_REPETITION: f"<step_1>3 + 4 = 7</step_1>\n<step_2>7 * 7 = 8</step_2>\n{rest}",
        CritiqueMode.OMISSION: rest,
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either attempt or steps"),
        ({"attempt": "a", "steps": ["a"]}, "either attempt or steps"),
        ({"steps": []}, "at least 1 item"),
        ({"steps": ["a", "\n"]}, "step 2 is blank"),
        ({"attempt": "a", "mode": "praise"}, "step_aligned"),
    ],
)
def test_a_request_that_cannot_be_read_says_why(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CritiqueRequest.model_validate({"question": "q", **fields})


def test_a_refused_answer_is_asked_for_once_more_with_the_reason() -> None:
    prompts: list[str] = []

    def answer(prompt: RenderedPrompt) -> str:
        prompts.append("\n".join(message["content"] for message in prompt.messages))
        return "all is well" if len(prompts) == 1 else COPY

    response = critique(FakeBackend(answer), prompts="chat-v1")
    assert response.critique is not None and response.failure is None
    assert response.retried is FailureReason.UNPARSEABLE
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (22, 14)
    first, second = prompts
    assert "all is well" in second and "no tags" in second and "all is well" not in first
    assert REQUEST.split().tagged in second


def test_an_answer_that_is_refused_twice_is_a_failure_with_its_last_reason() -> None:
    answers = iter(["all is well", COPY.replace("3 + 4 = 7", "3 + 4 = 8")])
    response = critique(FakeBackend(lambda _: next(answers)), prompts="chat-v1")
    assert response.critique is None and response.context is None
    assert response.failure is not None and response.failure.reason is FailureReason.COPIED_STEP_ALTERED
    assert response.retried is FailureReason.UNPARSEABLE


def test_a_truncated_answer_is_not_asked_for_again() -> None:
    backend = FakeBackend(lambda _: COPY, FinishReason.LENGTH)
    response = critique(backend, prompts="chat-v1")
    assert response.failure is not None and response.failure.reason is FailureReason.TRUNCATED
    assert response.retried is None and len(backend.prompts) == 1


@pytest.mark.parametrize("error", [PromptTooLongError("the prompt", 9, 8, "it"), UnsupportedRequestError("400")])
def test_a_retry_that_will_never_be_answered_leaves_the_first_failure(error: Exception) -> None:
    class Tight(FakeBackend):
        async def generate(self, prompt: RenderedPrompt) -> Generation:
            if self.prompts:
                raise error
            return await super().generate(prompt)

    response = critique(Tight(lambda _: "all is well"), prompts="chat-v1")
    assert response.failure is not None and response.failure.reason is FailureReason.UNPARSEABLE
    assert response.retried is None and response.usage.prompt_tokens == 11


def test_an_empty_answer_is_shown_as_such_when_it_is_asked_for_again() -> None:
    """Many servers take no empty turn."""
    backend = FakeBackend(lambda _: "")
    critique(backend, prompts="chat-v1")
    assert len(backend.prompts) == 2
    assert all(message["content"].strip() for message in backend.prompts[1].messages)


def test_a_retry_that_the_engine_fails_on_is_an_error_and_no_failure() -> None:
    class Broken(FakeBackend):
        async def generate(self, prompt: RenderedPrompt) -> Generation:
            if self.prompts:
                raise EngineError("broken")
            return await super().generate(prompt)

    with pytest.raises(EngineError):
        critique(Broken(lambda _: "all is well"), prompts="chat-v1")


def test_a_good_answer_is_not_asked_for_again() -> None:
    response = critique(FakeBackend(lambda _: COPY), prompts="chat-v1")
    assert response.retried is None and response.usage.prompt_tokens == 11
