"""The critic's cache and rate limit over real sockets, with a real Redis between replicas."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from redis import Redis

from stepalign.client import CriticClient
from stepalign.errors import ConfigError
from stepalign.types import CritiqueRequest
from stepalign_critic.app import AppSettings
from stepalign_critic.backends import create_backend
from stepalign_critic.cache import CritiqueCache
from stepalign_critic.cache.store import CritiqueStore
from stepalign_critic.http.access import ApiKeys
from stepalign_critic.http.rate_limit import RateLimiter
from stepalign_critic.service import CriticService
from stepalign_run.config import CriticServerSection
from support.critic_servers import CORRECT, GatedBackend, HeldBackend, error_of, metric, serving, wait_until

pytestmark = pytest.mark.slow


def lab_service() -> CriticService:
    return CriticService(
        create_backend(CriticServerSection(backend="program", checker="lab", prompts="lab-v1")), "lab-v1"
    )


def ready(url: str) -> str:
    wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
    return url


def ask(url: str, key: str | None = None, **fields: Any) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.post(f"{url}/v1/critiques", json={**CORRECT, **fields}, headers=headers, timeout=30)


def source(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.headers["x-stepalign-cache"]


def test_a_stampede_of_a_hundred_equal_requests_makes_one_generation() -> None:
    backend = GatedBackend()
    backend.load.set()
    with serving(CriticService(backend, "lab-v1"), AppSettings(cache=CritiqueCache(8))) as url:
        ready(url)

        async def stampede() -> list[httpx.Response]:
            limits = httpx.Limits(max_connections=100)
            async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
                tasks = [asyncio.create_task(client.post("/v1/critiques", json=CORRECT)) for _ in range(100)]
                while metric(url, "stepalign_critic_in_flight") < 100:
                    await asyncio.sleep(0.02)
                backend.gate.set()
                return list(await asyncio.gather(*tasks))

        answers = asyncio.run(stampede())
        assert Counter(map(source, answers)) == {"miss": 1, "joined": 99}
        assert backend.attempts == [CORRECT["attempt"]]
        bodies = [answer.json() for answer in answers]
        assert len({body["id"] for body in bodies}) == 100
        assert all({**body, "id": ""} == {**bodies[0], "id": ""} for body in bodies)
        assert source(ask(url)) == "hit" and source(ask(url, answer="5")) == "miss"
        assert metric(url, 'stepalign_critic_cache_total{source="joined"}') == 99
        # Tokens are counted where they were generated.
        assert metric(url, 'stepalign_critic_tokens_total{kind="completion"}') == 6


@pytest.mark.redis
def test_replicas_share_answers_through_a_redis_and_a_restart(cache_server: str) -> None:
    def settings() -> AppSettings:
        return AppSettings(cache=CritiqueCache(8, CritiqueStore(cache_server, 60), {"test": "replicas"}))

    with serving(lab_service(), settings()) as one, serving(lab_service(), settings()) as two:
        first, second, third = ask(ready(one)), ask(ready(two)), ask(two)
        assert [source(answer) for answer in (first, second, third)] == ["miss", "shared", "hit"]
        assert {**first.json(), "id": ""} == {**second.json(), "id": ""}
    with serving(lab_service(), settings()) as restarted:
        assert source(ask(ready(restarted))) == "shared"


@pytest.mark.redis
def test_a_shared_answer_comes_in_time_however_long_the_wait_for_a_new_one(cache_server: str) -> None:
    def settings() -> AppSettings:
        return AppSettings(cache=CritiqueCache(8, CritiqueStore(cache_server, 60), {"test": "deadline"}))

    soon = {"x-request-timeout-ms": "5000"}
    first, second = HeldBackend(), HeldBackend()
    first.let_pass(CORRECT["attempt"])
    second.wait = 3600.0
    with serving(CriticService(first, "lab-v1"), settings()) as url:
        assert source(ask(ready(url))) == "miss"
    with serving(CriticService(second, "lab-v1"), settings()) as url:
        ready(url)
        for expected in ("shared", "hit"):
            answer = httpx.post(f"{url}/v1/critiques", json=CORRECT, headers=soon)
            assert source(answer) == expected
        other = httpx.post(f"{url}/v1/critiques", json={**CORRECT, "answer": "8"}, headers=soon)
        assert (other.status_code, error_of(other)["code"]) == (504, "deadline_unreachable")
    assert second.held == {}


def test_a_cache_server_that_is_down_costs_no_answer_and_is_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    cache = CritiqueCache(8, CritiqueStore(f"redis://127.0.0.1:{port}/0", 60))
    with serving(lab_service(), AppSettings(cache=cache)) as url:
        assert source(ask(ready(url))) == "miss"
        assert source(ask(url)) == "hit"
        assert metric(url, "stepalign_critic_cache_store_errors_total") == 1


@pytest.mark.redis
def test_a_server_that_evicts_nothing_is_left_alone(redis_server: str) -> None:
    """It may be the work queue's, which a cache would fill up."""
    cache = CritiqueCache(8, CritiqueStore(redis_server, 60), {"test": "noeviction"})
    with serving(lab_service(), AppSettings(cache=cache)) as url, Redis.from_url(redis_server) as redis:
        before = redis.dbsize()
        assert source(ask(ready(url))) == "miss"
        assert metric(url, "stepalign_critic_cache_store_errors_total") == 1
        assert redis.dbsize() == before


def test_an_address_that_is_no_redis_is_refused() -> None:
    with pytest.raises(ConfigError, match="REDIS_CACHE_URL"):
        CritiqueStore("http://127.0.0.1", 60)


KEYS = ("sk-one", "sk-two")


@pytest.fixture
def limited() -> Iterator[str]:
    settings = AppSettings(api_keys=ApiKeys(KEYS), cache=CritiqueCache(8), limiter=RateLimiter(2))
    with serving(lab_service(), settings) as url:
        yield ready(url)


def test_callers_with_other_keys_share_no_answers(limited: str) -> None:
    assert [source(ask(limited, key)) for key in (*KEYS, KEYS[0])] == ["miss", "miss", "hit"]


def test_a_key_over_its_rate_is_told_when_to_return_and_no_other_suffers(limited: str) -> None:
    statuses = [ask(limited, KEYS[0]).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    refused = ask(limited, KEYS[0])
    assert error_of(refused)["code"] == "rate_limited" and 1 <= int(refused.headers["retry-after"]) <= 30
    assert ask(limited, KEYS[1]).status_code == 200
    assert httpx.get(f"{limited}/health/ready").status_code == 200


def test_items_of_a_batch_count_one_by_one(limited: str) -> None:
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    answer = httpx.post(f"{limited}/v1/critiques/batch", json={"items": [CORRECT] * 3}, headers=headers)
    items = answer.json()["items"]
    assert sorted(item["status"] for item in items) == [200, 200, 429]
    assert next(item for item in items if item["status"] == 429)["error"]["code"] == "rate_limited"


def test_the_client_waits_as_long_as_it_is_told() -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.sleep(0.55)

    async def main(url: str) -> None:
        async with CriticClient(url, timeout=60, sleep=sleep) as client:
            for _ in range(121):
                await client.critique(CritiqueRequest.model_validate(CORRECT))

    settings = AppSettings(cache=CritiqueCache(8), limiter=RateLimiter(120))
    with serving(lab_service(), settings) as url:
        asyncio.run(main(ready(url)))
    # A place comes back every half second; Retry-After is in whole ones.
    assert len(pauses) <= 2 and all(pause >= 1.0 for pause in pauses)
