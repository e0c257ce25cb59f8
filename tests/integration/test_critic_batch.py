"""Batches, deadlines, the model list and the synchronous client, at a critic over a real socket."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from stepalign.client import CriticClient, SyncCriticClient
from stepalign.errors import CriticError, CriticRequestError, CriticUnavailableError
from stepalign.types import (
    CritiqueBatchItem,
    CritiqueBatchResponse,
    CritiqueRequest,
    CritiqueResponse,
    ModelList,
    Verdict,
)
from stepalign_critic.app import AppSettings
from stepalign_critic.service import CriticService
from support.critic_servers import (
    ANSWER,
    CORRECT,
    QUESTION,
    STEP_1,
    STEP_2,
    GatedBackend,
    HeldBackend,
    error_of,
    metric,
    serving,
    wait_until,
)

pytestmark = pytest.mark.slow

FIRST, SECOND, THIRD = f"{STEP_1} {STEP_2} {ANSWER}", f"{STEP_1} <step_2> 7 *", f"{STEP_1} {ANSWER}"
LINES = {"accept": "application/x-ndjson"}


def item(attempt: str) -> dict[str, Any]:
    return {"question": QUESTION, "attempt": attempt, "answer": "9"}


def items(*attempts: str) -> dict[str, Any]:
    return {"items": [item(attempt) for attempt in attempts]}


@pytest.fixture
def held() -> Iterator[tuple[str, HeldBackend]]:
    """A ready critic that takes batches of four."""
    backend = HeldBackend()
    with serving(CriticService(backend, "lab-v1"), AppSettings(max_batch_items=4)) as url:
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        yield url, backend


@pytest.fixture
def gated() -> Iterator[tuple[str, GatedBackend, CriticService]]:
    """A critic that loads until it is let go, and one of whose requests may wait."""
    backend = GatedBackend()
    service = CriticService(backend, "lab-v1")
    with serving(service) as url:
        yield url, backend, service
        backend.load.set()
        backend.gate.set()


def test_items_are_answered_in_the_order_of_the_request(held: tuple[str, HeldBackend]) -> None:
    url, backend = held
    with ThreadPoolExecutor() as threads:
        running = threads.submit(httpx.post, f"{url}/v1/critiques/batch", json=items(FIRST, SECOND, THIRD), timeout=30)
        for attempt in (THIRD, FIRST, SECOND):
            backend.release(attempt)
        answer = running.result(30)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    answered = CritiqueBatchResponse.model_validate_json(answer.content).items
    assert [(found.index, found.status) for found in answered] == [(0, 200), (1, 200), (2, 200)]
    critiques = [found.response.critique for found in answered if found.response is not None]
    assert [found.verdict for found in critiques if found is not None] == [
        Verdict.CORRECT,
        Verdict.INCOMPLETE,
        Verdict.UNJUSTIFIED,
    ]
    assert metric(url, "stepalign_critic_critique_seconds_count") == 3
    assert metric(url, 'stepalign_critic_critiques_total{outcome="correct"}') == 1
    assert metric(url, 'stepalign_critic_tokens_total{kind="prompt"}') == 15
    assert metric(url, "stepalign_critic_in_flight") == 0
    assert metric(url, 'stepalign_critic_requests_total{path="/v1/critiques/batch",status="200"}') == 1


def test_lines_come_as_soon_as_their_items_are_done(held: tuple[str, HeldBackend]) -> None:
    url, backend = held
    body = items(FIRST, SECOND, THIRD)
    with httpx.stream("POST", f"{url}/v1/critiques/batch", json=body, headers=LINES, timeout=30) as answer:
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-ndjson")
        lines = answer.iter_lines()
        for attempt, index in ((SECOND, 1), (THIRD, 2), (FIRST, 0)):
            backend.release(attempt)
            # The items that are held yet are held while this line is read.
            read = CritiqueBatchItem.model_validate_json(next(lines))
            assert (read.index, read.status) == (index, 200)
        assert list(lines) == []


@pytest.mark.parametrize("headers", [{}, LINES, {"accept": "text/html, Application/X-NDJSON;q=0.9"}])
def test_every_item_has_a_status_of_its_own(held: tuple[str, HeldBackend], headers: dict[str, str]) -> None:
    url, backend = held
    body = {"items": [item(FIRST), item("broken"), {"question": "", "attempt": FIRST}, "not an object"]}
    with ThreadPoolExecutor() as threads:
        running = threads.submit(httpx.post, f"{url}/v1/critiques/batch", json=body, headers=headers, timeout=30)
        backend.release(FIRST)
        answer = running.result(30)
    answered = [json.loads(line) for line in answer.text.splitlines()] if headers else answer.json()["items"]
    assert answer.status_code == 200
    assert [(found["status"], found["error"] and found["error"]["code"]) for found in in_order(answered)] == [
        (200, None),
        (502, "engine_error"),
        (422, "invalid_request"),
        (422, "invalid_request"),
    ]
    assert [found["error"] and found["error"]["param"] for found in in_order(answered)] == [
        None,
        None,
        "items.2.question",
        "items.3",
    ]
    assert all((found["response"] is None) == (found["status"] != 200) for found in answered)


def in_order(answered: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(answered, key=lambda found: found["index"])


def test_a_bug_costs_its_item_alone(gated: tuple[str, GatedBackend, CriticService]) -> None:
    url, backend, _ = gated
    backend.load.set()
    backend.gate.set()
    wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
    answer = httpx.post(f"{url}/v1/critiques/batch", json=items("bug", FIRST, "too long"))
    assert [(found["status"], found["error"] and found["error"]["code"]) for found in answer.json()["items"]] == [
        (500, "internal_error"),
        (200, None),
        (422, "prompt_too_long"),
    ]
    assert "a bug" not in answer.text


def test_an_item_at_a_full_queue_is_saturated_and_the_others_are_answered(
    gated: tuple[str, GatedBackend, CriticService],
) -> None:
    url, backend, _ = gated
    backend.load.set()
    wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
    with ThreadPoolExecutor() as threads:
        running = threads.submit(httpx.post, f"{url}/v1/critiques", json=CORRECT, timeout=30)
        wait_until(lambda: backend.attempts)
        asked = items(FIRST, SECOND)
        with httpx.stream("POST", f"{url}/v1/critiques/batch", json=asked, headers=LINES, timeout=30) as many:
            lines = many.iter_lines()
            refused = json.loads(next(lines))
            backend.gate.set()
            assert running.result(30).status_code == 200
            answered = json.loads(next(lines))
    assert (refused["index"], refused["status"], refused["error"]["code"]) == (1, 503, "saturated")
    assert (answered["index"], answered["status"]) == (0, 200)
    assert metric(url, "stepalign_critic_critique_seconds_count") == 2


@pytest.mark.parametrize("headers", [{}, LINES])
def test_a_batch_of_which_nothing_can_be_answered_is_refused_whole(
    gated: tuple[str, GatedBackend, CriticService], headers: dict[str, str]
) -> None:
    url, backend, service = gated
    answer = httpx.post(f"{url}/v1/critiques/batch", json=items(FIRST, SECOND), headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (503, "loading")
    assert answer.headers["retry-after"] == "1"
    mixed = {"items": [item(FIRST), {}]}
    answer = httpx.post(f"{url}/v1/critiques/batch", json=mixed)
    assert [found["status"] for found in answer.json()["items"]] == [503, 422]
    backend.load.set()
    wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
    service.lifecycle.stop()
    answer = httpx.post(f"{url}/v1/critiques/batch", json=items(FIRST), headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (503, "stopping")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"items": []}, "items"),
        ({"items": [CORRECT] * 5}, "items"),
        ({}, "items"),
        ({"items": CORRECT}, "items"),
        ({"items": [CORRECT], "model": "m"}, "model"),
    ],
)
def test_a_batch_that_is_no_batch_is_refused_whole(held: tuple[str, HeldBackend], body: Any, param: str) -> None:
    url, backend = held
    answer = httpx.post(f"{url}/v1/critiques/batch", json=body)
    assert (answer.status_code, error_of(answer)["code"], error_of(answer)["param"]) == (422, "invalid_request", param)
    assert not backend.held


@pytest.mark.parametrize("headers", [{}, LINES])
def test_a_client_that_hangs_up_cancels_what_is_not_done(
    held: tuple[str, HeldBackend], headers: dict[str, str]
) -> None:
    url, backend = held

    async def main() -> None:
        async with httpx.AsyncClient(timeout=30) as client:
            asking = asyncio.create_task(
                client.post(f"{url}/v1/critiques/batch", json=items(FIRST, SECOND, THIRD), headers=headers)
            )
            while len(backend.held) < 3:
                await asyncio.sleep(0.005)
            await asyncio.to_thread(backend.release, FIRST)
            while metric(url, "stepalign_critic_critique_seconds_count") < 1:
                await asyncio.sleep(0.005)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(main())
    wait_until(lambda: sorted(backend.cancelled) == sorted([SECOND, THIRD]))
    requests = 'stepalign_critic_requests_total{path="/v1/critiques/batch",status="499"}'
    wait_until(lambda: metric(url, requests) == 1)
    assert metric(url, "stepalign_critic_in_flight") == 0
    assert metric(url, "stepalign_critic_critique_seconds_count") == 1, "what was cancelled has no time of an answer"


def test_when_the_deadline_passes_the_work_is_given_up(held: tuple[str, HeldBackend]) -> None:
    url, backend = held
    answer = httpx.post(f"{url}/v1/critiques", json=CORRECT, headers={"x-request-timeout-ms": "50"}, timeout=30)
    assert (answer.status_code, error_of(answer)["code"]) == (504, "deadline_exceeded")
    assert error_of(answer)["type"] == "server_error"
    assert backend.cancelled == [FIRST]


def test_the_deadline_holds_for_each_item_and_keeps_what_was_done_before(held: tuple[str, HeldBackend]) -> None:
    url, backend = held
    backend.let_pass(FIRST)
    headers = {"x-request-timeout-ms": "1000"}
    answer = httpx.post(f"{url}/v1/critiques/batch", json=items(FIRST, SECOND), headers=headers, timeout=30)
    assert [(found["status"], found["error"] and found["error"]["code"]) for found in answer.json()["items"]] == [
        (200, None),
        (504, "deadline_exceeded"),
    ]
    assert backend.cancelled == [SECOND]


def test_a_wait_that_alone_outlasts_the_deadline_is_refused_at_once(held: tuple[str, HeldBackend]) -> None:
    url, backend = held
    backend.wait = 3000.0
    hurried = {"x-request-timeout-ms": "2000000"}
    answer = httpx.post(f"{url}/v1/critiques", json=CORRECT, headers=hurried)
    assert (answer.status_code, error_of(answer)["code"]) == (504, "deadline_unreachable")
    answer = httpx.post(f"{url}/v1/critiques/batch", json=items(FIRST, SECOND), headers=hurried)
    assert [found["error"]["code"] for found in answer.json()["items"]] == ["deadline_unreachable"] * 2
    assert not backend.held
    with ThreadPoolExecutor() as threads:
        patient = {"x-request-timeout-ms": "3600000"}
        running = threads.submit(httpx.post, f"{url}/v1/critiques", json=CORRECT, headers=patient, timeout=30)
        backend.release(FIRST)
        assert running.result(30).status_code == 200


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "soon", "", "3600001"])
@pytest.mark.parametrize("path", ["/v1/critiques", "/v1/critiques/batch"])
def test_a_timeout_that_is_no_number_of_milliseconds_is_refused(
    held: tuple[str, HeldBackend], path: str, value: str
) -> None:
    url, _ = held
    body = CORRECT if path == "/v1/critiques" else {"items": [CORRECT]}
    answer = httpx.post(url + path, json=body, headers={"X-Request-Timeout-Ms": value})
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (422, "invalid_request", "x-request-timeout-ms")


def test_the_clients_deadline_reaches_the_service(held: tuple[str, HeldBackend]) -> None:
    """The client would wait for half a minute; the service knows at once that it takes longer."""
    url, backend = held
    backend.wait = 3000.0

    async def main() -> None:
        async with CriticClient(url, timeout=30, backoff=100, max_backoff=100) as client:
            await client.critique(CritiqueRequest(**CORRECT))

    with pytest.raises(CriticUnavailableError, match="deadline_unreachable"):
        asyncio.run(main())


def test_the_served_model_is_listed_once_it_is_ready(gated: tuple[str, GatedBackend, CriticService]) -> None:
    url, backend, _ = gated
    answer = httpx.get(f"{url}/v1/models")
    assert (answer.status_code, error_of(answer)["code"]) == (503, "loading")
    assert answer.headers["retry-after"] == "1"
    backend.load.set()
    wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
    answer = httpx.get(f"{url}/v1/models")
    (model,) = ModelList.model_validate_json(answer.content).data
    assert 0 <= time.time() - model.created < 600
    assert answer.json() == {
        "object": "list",
        "data": [
            {
                "id": "m",
                "object": "model",
                "created": model.created,
                "owned_by": "stepalign",
                "weights_revision": "w",
                "prompt_version": "lab-v1",
                "backend": "gated",
                "settings": None,
            }
        ],
    }


def verdict_of(outcome: CritiqueResponse | CriticError) -> Verdict:
    assert isinstance(outcome, CritiqueResponse) and outcome.critique is not None
    return outcome.critique.verdict


def test_a_synchronous_client_works_in_a_thread_that_runs_an_event_loop(held: tuple[str, HeldBackend]) -> None:
    url, backend = held

    async def notebook() -> list[CritiqueResponse | CriticError]:
        requests = [CritiqueRequest(**item(attempt)) for attempt in (FIRST, "x" * 200_000, SECOND)]
        with SyncCriticClient(url, timeout=30) as critic:
            critic.wait_ready(30)
            assert verdict_of(critic.critique(requests[0])) is Verdict.CORRECT
            return critic.critique_many(iter(requests), concurrency=2)

    with ThreadPoolExecutor() as threads:
        running = threads.submit(asyncio.run, notebook())
        for attempt in (FIRST, SECOND):
            backend.release(attempt)
        first, second, third = running.result(60)
    assert (verdict_of(first), verdict_of(third)) == (Verdict.CORRECT, Verdict.INCOMPLETE)
    assert isinstance(second, CriticRequestError) and second.code == "body_too_large"


def test_a_closed_synchronous_client_refuses_calls_and_may_be_closed_again(
    held: tuple[str, HeldBackend],
) -> None:
    url, _ = held
    critic = SyncCriticClient(url)
    with critic:
        critic.close()
    with pytest.raises(RuntimeError):
        critic.wait_ready()
