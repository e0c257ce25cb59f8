from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from pydantic import ValidationError
from redis import Redis

from stepalign.errors import PolicyError
from stepalign_run.policy_store import (
    Canary,
    PolicyStore,
    PolicyVersion,
    RedisPolicyStore,
    TrainingFinishedError,
    file_sha256,
    verify_adapter,
    verify_canary,
)
from stepalign_run.testing import MemoryPolicyStore

BASE = PolicyVersion(version=0, path="", sha256="")
CANARY = Canary(prompt_token_ids=[1, 2], completion_token_ids=[3, 4], logprobs=[-0.5, -2.0])
Run = Callable[[Callable[[PolicyStore], Awaitable[None]]], None]


def adapter(version: int, name: str = "adapter") -> PolicyVersion:
    return PolicyVersion(version=version, path=f"/runs/x/{name}-{version}", sha256=f"{version:064x}", canary=CANARY)


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.redis)])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a scenario with a store, and close it."""

    def open_store() -> PolicyStore:
        if request.param == "memory":
            return MemoryPolicyStore()
        return RedisPolicyStore(request.getfixturevalue("redis_server"), f"policy-{uuid.uuid4().hex}", 3.0)

    def go(scenario: Callable[[PolicyStore], Awaitable[None]]) -> None:
        async def body() -> None:
            store = open_store()
            try:
                await scenario(store)
            finally:
                await store.close()

        asyncio.run(body())

    return go


def test_the_newest_version_is_the_one_published_last(run: Run) -> None:
    async def scenario(store: PolicyStore) -> None:
        assert await store.latest() is None
        for policy in (BASE, adapter(1), adapter(2)):
            assert await store.publish(policy) is True
            assert await store.latest() == policy

    run(scenario)


def test_versions_never_go_backwards(run: Run) -> None:
    async def scenario(store: PolicyStore) -> None:
        await store.publish(adapter(10))
        assert await store.publish(adapter(9)) is False
        assert await store.latest() == adapter(10)
        # A trainer that resumes publishes its last version again, perhaps in another folder.
        assert await store.publish(adapter(10, "again")) is True
        assert await store.latest() == adapter(10, "again")

    run(scenario)


def test_waiting_ends_when_the_version_or_a_later_one_comes(run: Run) -> None:
    async def scenario(store: PolicyStore) -> None:
        await store.publish(adapter(1))
        waiting = asyncio.create_task(store.wait_for(3, 0.005))
        await store.publish(adapter(2))
        await asyncio.sleep(0.03)
        assert not waiting.done()
        await store.publish(adapter(4))
        assert await asyncio.wait_for(waiting, 5) == adapter(4)

    run(scenario)


def test_waiting_for_a_version_that_never_comes_ends_with_the_training(run: Run) -> None:
    async def scenario(store: PolicyStore) -> None:
        await store.publish(adapter(1))
        waiting = asyncio.create_task(store.wait_for(2, 0.005))
        await asyncio.sleep(0.02)
        await store.finish()
        with pytest.raises(TrainingFinishedError, match="before policy version 2; the newest is 1"):
            await asyncio.wait_for(waiting, 5)
        assert await store.wait_for(1, 0.005) == adapter(1)

    run(scenario)


def test_a_finished_training_is_taken_up_again_by_publishing(run: Run) -> None:
    async def scenario(store: PolicyStore) -> None:
        assert await store.finished() is False
        await store.publish(adapter(2))
        await store.finish()
        assert await store.finished() is True
        await store.publish(adapter(1))
        assert await store.finished() is True
        await store.publish(adapter(2))
        assert await store.finished() is False

    run(scenario)


@pytest.mark.parametrize(
    ("version", "path", "sha256", "canary"),
    [
        (0, "/somewhere", "0" * 64, None),
        (0, "", "0" * 64, None),
        (0, "", "", CANARY),
        (1, "", "", None),
        (1, "/a", "", CANARY),
        (1, "/a", "0" * 64, None),
        (1, "/a", "ABC", CANARY),
        (-1, "", "", None),
    ],
)
def test_half_described_versions_are_refused(version: int, path: str, sha256: str, canary: Canary | None) -> None:
    with pytest.raises(ValidationError):
        PolicyVersion(version=version, path=path, sha256=sha256, canary=canary)


def test_a_canary_has_a_value_for_each_token() -> None:
    with pytest.raises(ValidationError, match="one log-probability for each token"):
        Canary(prompt_token_ids=[1], completion_token_ids=[3, 4], logprobs=[-0.5])


@pytest.mark.parametrize("found", [[-0.5, -2.1], [-0.5, float("nan")], [-0.4, -2.0]])
def test_a_model_with_another_adapter_is_found_by_its_canary(found: list[float]) -> None:
    verify_canary(adapter(1), [-0.5004, -1.9996], tolerance=1e-3)
    with pytest.raises(PolicyError, match="samples with another adapter"):
        verify_canary(adapter(1), found, tolerance=1e-3)


def test_an_adapter_is_verified_by_its_weights(tmp_path: Path) -> None:
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"weights")
    assert file_sha256(weights) == hashlib.sha256(b"weights").hexdigest()
    policy = PolicyVersion(version=1, path=str(tmp_path), sha256=file_sha256(weights), canary=CANARY)
    verify_adapter(policy)
    weights.write_bytes(b"weight")
    with pytest.raises(PolicyError, match="changed or copied in part"):
        verify_adapter(policy)
    weights.unlink()
    with pytest.raises(PolicyError, match="cannot be read"):
        verify_adapter(policy)


def test_the_base_model_has_no_adapter_to_verify() -> None:
    verify_adapter(BASE)


@pytest.mark.redis
@pytest.mark.parametrize("synced", [True, False], ids=["append-only file", "none"])
def test_the_end_of_a_training_is_on_disk_once_it_is_announced(redis_server: str, synced: bool) -> None:
    async def scenario() -> bool:
        store = RedisPolicyStore(redis_server, f"policy-{uuid.uuid4().hex}", 3.0)
        try:
            await store.finish()
            return await store.finished()
        finally:
            await store.close()

    with Redis.from_url(redis_server) as redis:
        redis.config_set("appendonly", "yes" if synced else "no")
        redis.config_resetstat()
        try:
            assert asyncio.run(scenario())
            wait = redis.info("commandstats")["cmdstat_waitaof"]
        finally:
            redis.config_set("appendonly", "yes")
    assert (wait["calls"], wait["failed_calls"]) == (1, 0 if synced else 1)
