"""The critic on vLLM under load: aligned decoding at concurrency 16, callers of three keys, clients that hang up.

What is constrained and what is copied takes other ways through the engine, and both share its prefix cache.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import httpx
import pytest

from stepalign import CritiqueRequest, CritiqueResponse, StepStatus
from support.vllm_service import KEYS, Service, bearer, vllm_service

# A busy machine may need minutes for the start of the engine alone.
pytestmark = pytest.mark.timeout(1200)

REQUESTS, CONCURRENCY = 48, 16
PATH = "/v1/critiques"
ALL = ("200", "499")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with vllm_service(tmp_path_factory.mktemp("load"), 'prompts = "chat-v2"\nmax_new_tokens = 120') as service:
        yield service


def request(number: int) -> CritiqueRequest:
    """The ``number``-th request: every second attempt is right, every fourth known answer is not sent."""
    a, b, c = 2 + number % 7, 3 + number % 5, 11 + number
    slip = number % 2
    product, total = a * b, a * b + c + slip
    return CritiqueRequest(
        question=f"A box holds {a} rows of {b} pens, and {c} more lie beside it. How many pens are there?",
        attempt=f"The box holds {a} * {b} = {product} pens.\nIn all {product} + {c} = {total}.\n#### {total}",
        answer=None if number % 4 == 0 else str(a * b + c),
    )


async def ask_all(service: Service, hang_up_after: dict[int, float]) -> dict[int, httpx.Response]:
    """The answers by request; without those whose client hung up, so many seconds after it had begun to ask."""
    answers: dict[int, httpx.Response] = {}
    places = asyncio.Semaphore(CONCURRENCY)

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        body, key = request(number).model_dump(mode="json", exclude_none=True), KEYS[number % len(KEYS)]
        async with places:
            post = client.post(PATH, json=body, headers=bearer(key))
            try:
                answers[number] = await asyncio.wait_for(post, hang_up_after.get(number))
            except TimeoutError:
                assert number in hang_up_after

    async with httpx.AsyncClient(base_url=service.url, timeout=300) as client:
        await asyncio.gather(*(ask(client, number) for number in range(REQUESTS)))
    return answers


def check(answer: httpx.Response, request: CritiqueRequest) -> CritiqueResponse:
    """The response, which is a critique of this request's attempt."""
    assert answer.status_code == 200, answer.text
    response = CritiqueResponse.model_validate(answer.json())
    assert response.critique is not None, response.failure
    steps = (request.attempt or "").splitlines()[:-1]
    copies = [step for step in response.critique.steps if step.status is StepStatus.COPIED]
    assert [step.body for step in copies] == [steps[step.number - 1] for step in copies]
    assert request.answer in (None, response.critique.answer)
    assert response.p_wrong is not None and len(response.p_wrong) == 2
    return response


def test_every_answer_under_load_is_a_critique_and_nothing_is_left_running(service: Service) -> None:
    choose = random.Random(0)
    hang_up_after = {number: choose.uniform(0.1, 4) for number in range(2, REQUESTS, 4)}
    answers = asyncio.run(ask_all(service, hang_up_after))
    responses = [check(answer, request(number)) for number, answer in answers.items()]
    assert len(responses) >= REQUESTS - len(hang_up_after)

    def unfinished() -> float:
        """What is being worked on, by the service and by the engine."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "stepalign_critic_in_flight")
        return sum(service.metric(name) for name in (*names, "stepalign_critic_connections"))

    service.wait_until(lambda: unfinished() == 0)
    counted = {status: service.metric("stepalign_critic_requests_total", path=PATH, status=status) for status in ALL}
    # A client may hang up while its answer is on the way, and before its request is.
    assert len(responses) <= counted["200"] and counted["499"] >= 1
    assert counted["200"] + counted["499"] <= REQUESTS
    assert sum(counted.values()) == service.metric("stepalign_critic_requests_total", path=PATH)
    assert service.metric("stepalign_critic_critiques_total") == counted["200"]
    assert service.metric("stepalign_critic_critique_seconds_count") == counted["200"]
    assert service.metric("stepalign_critic_cache_total", source="miss") == counted["200"]
    assert service.metric("stepalign_critic_answers_total") >= counted["200"]
    written = sum(response.usage.completion_tokens for response in responses)
    assert service.metric("stepalign_critic_tokens_total", kind="completion") >= written
    assert service.metric("vllm:request_success_total", finished_reason="error") == 0
    assert service.metric("vllm:prefix_cache_hits_total") > 0
