"""The backend ``openai``: what is particular to a model that somebody else serves. The rest is in the contract."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from fastapi.responses import JSONResponse, Response
from httpx_aiohttp import AiohttpTransport
from structlog.testing import capture_logs

import stepalign_lab
from stepalign.errors import ConfigError
from stepalign.types import CritiqueRequest, FinishReason
from stepalign_critic.backends import create_backend
from stepalign_critic.backends.base import Backend, Generation, RenderedPrompt
from stepalign_critic.backends.openai import OpenAIBackend
from stepalign_critic.errors import EngineError, NotReadyError, SaturatedError, ServiceError, UnsupportedRequestError
from stepalign_critic.service import CriticService
from stepalign_run.config import CriticServerSection
from support.openai_server import OpenAIServer, chat_completion, running

pytestmark = pytest.mark.slow

T = TypeVar("T")
CRITIC = Path(stepalign_lab.__file__).parent / "assets" / "critic"
MODEL: dict[str, Any] = {
    "backend": "transformers",
    "path": CRITIC,
    "prompts": "lab-v1",
    "device": "cpu",
    "max_prompt_tokens": 256,
    "max_new_tokens": 96,
}
ATTEMPTS = [
    "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 9 </step_2> <answer> 9 </answer>",
    "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 1 </step_2> <answer> 1 </answer>",
]


def request_of(attempt: str) -> CritiqueRequest:
    return CritiqueRequest(
        question="3 + 4 * 7", attempt=attempt, answer="9", reference_solution="7 is 4 + of 3 ; 9 is 7 * of 7 ; so 9"
    )


@pytest.fixture(scope="module")
def server() -> Iterator[OpenAIServer]:
    served = OpenAIServer(create_backend(CriticServerSection(**MODEL)))
    with running(served.app) as url:
        served.url = url  # type: ignore[attr-defined]
        yield served


def openai(url: str, **settings: Any) -> CriticServerSection:
    limits = {"max_new_tokens": 96, "prompts": "lab-v1", **{k: v for k, v in settings.items() if k.startswith("max_")}}
    served = {key: value for key, value in settings.items() if not key.startswith("max_")}
    return CriticServerSection(backend="openai", openai={"base_url": f"{url}/v1", **served}, **limits)  # type: ignore[arg-type]


def with_backend(backend: Backend, work: Callable[[], Awaitable[T]]) -> T:
    async def main() -> T:
        await backend.start()
        try:
            return await asyncio.wait_for(work(), 60)
        finally:
            await backend.stop()

    return asyncio.run(main())


async def ask(backend: Backend, attempt: str) -> Generation:
    request = request_of(attempt)
    messages = CriticService(backend, "lab-v1").messages(request)
    return await backend.generate(RenderedPrompt(request, messages, backend.render(messages)))


def test_a_request_that_is_dropped_does_not_hold_up_the_next(server: Any) -> None:
    backend = create_backend(openai(server.url))

    async def work() -> Generation:
        dropped = [asyncio.create_task(ask(backend, ATTEMPTS[0])) for _ in range(8)]
        await asyncio.sleep(0.01)
        for task in dropped:
            task.cancel()
        await asyncio.gather(*dropped, return_exceptions=True)
        return await ask(backend, ATTEMPTS[1])

    assert "<corrected/>" in with_backend(backend, work).text


def test_before_its_start_it_has_no_identity() -> None:
    with pytest.raises(NotReadyError):
        create_backend(openai("http://127.0.0.1:9")).identity("lab-v1")


def test_the_server_is_asked_greedily_with_the_messages_and_the_budget(server: Any) -> None:
    backend = create_backend(openai(server.url, model="critic", revision="r7"))
    server.asked.clear()

    async def work() -> tuple[Generation, str]:
        return await ask(backend, ATTEMPTS[0]), backend.identity("p").weights_revision

    _, revision = with_backend(backend, work)
    # The first asks for a word, to see whether the server takes the fields.
    word, body = server.asked
    assert {key: word[key] for key in word if key != "messages"} == {
        key: body[key] for key in body if key != "messages"
    }
    assert (body["model"], body["temperature"], body["max_tokens"], revision) == ("critic", 0, 96, "r7")
    assert body["messages"] == CriticService(backend, "lab-v1").messages(request_of(ATTEMPTS[0]))


REPLIES: dict[str, tuple[Response, type[ServiceError]]] = {
    "rate": (JSONResponse({"error": {}}, 429), SaturatedError),
    "loading": (JSONResponse({"error": {}}, 503), SaturatedError),
    "too long": (JSONResponse({"error": {"message": "maximum context length"}}, 400), UnsupportedRequestError),
    "broken": (JSONResponse({"error": {}}, 500), EngineError),
    "wrong key": (JSONResponse({"error": {}}, 401), NotReadyError),
    "no JSON": (Response("<html>", 200), EngineError),
    "no choice": (JSONResponse({"choices": []}, 200), EngineError),
}


@pytest.mark.parametrize("name", REPLIES)
def test_a_failed_call_of_the_server_is_an_error_and_never_an_answer(server: Any, name: str) -> None:
    backend = create_backend(openai(server.url))
    reply, kind = REPLIES[name]

    async def work() -> Generation:
        server.reply = reply
        return await ask(backend, ATTEMPTS[0])

    try:
        with pytest.raises(kind):
            with_backend(backend, work)
    finally:
        server.reply = None


def test_an_answer_that_ran_out_of_tokens_says_so(server: Any) -> None:
    backend = create_backend(openai(server.url))
    server.reply = JSONResponse(chat_completion("<step_1>", "length"))
    try:
        made = with_backend(backend, lambda: ask(backend, ATTEMPTS[0]))
    finally:
        server.reply = None
    assert made == Generation("<step_1>", FinishReason.LENGTH, 3, 2)


def test_requests_over_the_limit_are_refused_and_a_dropped_one_hangs_up(server: Any) -> None:
    backend = create_backend(openai(server.url, max_batch=1, max_queue=1))
    server.asked.clear()
    server.gone = 0
    server.hold.clear()

    async def work() -> Any:
        tasks: list[asyncio.Task[Generation]] = []
        for count in (1, 2):
            tasks.append(asyncio.create_task(ask(backend, ATTEMPTS[0])))
            while count == 1 and not server.asked:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        with pytest.raises(SaturatedError, match="wait already"):
            await ask(backend, ATTEMPTS[0])
        tasks[0].cancel()
        while not server.gone:
            await asyncio.sleep(0.01)
        server.hold.set()
        return await tasks[1]

    try:
        assert "<verdict>" in with_backend(backend, work).text
    finally:
        server.hold.set()


def test_a_silent_server_makes_the_backend_unhealthy_until_it_answers(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepalign_critic.backends.openai._LOOK_SECONDS", 0.02)
    backend = create_backend(openai(server.url))

    async def work() -> None:
        for status, healthy in ((500, False), (200, True)):
            server.models_status = status
            while backend.healthy() is not healthy:
                await asyncio.sleep(0.01)

    try:
        with_backend(backend, work)
    finally:
        server.models_status = 200


@pytest.mark.parametrize(("wanted", "served"), [("other", ("critic",)), (None, ("a", "b")), (None, ())])
def test_a_model_that_is_not_served_is_refused_with_those_that_are(wanted: str | None, served: tuple[str, ...]) -> None:
    stub = OpenAIServer(create_backend(CriticServerSection(backend="program", checker="lab")), served)
    with running(stub.app) as url, pytest.raises(ConfigError, match="serves"):
        backend = create_backend(openai(url, model=wanted))
        with_backend(backend, lambda: ask(backend, ATTEMPTS[0]))


def test_the_key_is_sent_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    stub = OpenAIServer(create_backend(CriticServerSection(backend="program", checker="lab")), key="right")
    for key, fits in (("right", True), ("wrong", False)):
        file = tmp_path / key
        file.write_text(key)
        with running(stub.app) as url:
            backend = create_backend(openai(url, api_key_file=file))
            if fits:
                with_backend(backend, lambda: asyncio.sleep(0))
            else:
                with pytest.raises(ConfigError, match="refuses the key"):
                    with_backend(backend, lambda: asyncio.sleep(0))


def test_a_server_that_never_comes_up_is_named_by_its_setting_and_in_the_log() -> None:
    backend = create_backend(openai("http://127.0.0.1:9", timeout_seconds=0.2))
    refused = pytest.raises(ConfigError, match=r"critic\.openai\.base_url took no requests in 0\.2 s: \w+$")
    with capture_logs() as logs, refused:
        with_backend(backend, lambda: asyncio.sleep(0))
    assert "http://127.0.0.1:9/v1" in [entry.get("base_url") for entry in logs]


def test_requests_go_through_aiohttp(server: Any) -> None:
    backend = create_backend(openai(server.url))
    assert isinstance(backend, OpenAIBackend)
    assert isinstance(backend._http._transport, AiohttpTransport)  # pyright: ignore[reportPrivateUsage]
    asyncio.run(backend.stop())
