"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from stepalign_launcher.redis_server import EmbeddedRedis
from stepalign_run.rollout import Rollout

RolloutFactory = Callable[..., Rollout]
# Whole runs, longest first.
LONG = ("test_restarts.py", "test_loop.py", "test_smollm2.py", "test_whole_runs.py", "test_probe.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: one that begins last keeps one worker busy while the others have nothing left to do."""

    def place(item: pytest.Item) -> int:
        name = item.path.name
        return LONG.index(name) if name in LONG else len(LONG) + (item.get_closest_marker("slow") is None)

    items.sort(key=place)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real server. Tests keep apart by their run ids."""
    directory: Path = tmp_path_factory.mktemp("redis")
    with EmbeddedRedis(directory) as url:
        yield url


@pytest.fixture(scope="session")
def cache_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real server that evicts, as a cache's should."""
    with EmbeddedRedis(tmp_path_factory.mktemp("cache")) as url, Redis.from_url(url) as redis:
        redis.config_set("maxmemory-policy", "allkeys-lru")
        yield url


@pytest.fixture
def make_rollout() -> RolloutFactory:
    """A valid rollout; ``make_rollout(rollout_id="r7", group_id="g2")`` overrides any field."""

    def make(**overrides: Any) -> Rollout:
        fields: dict[str, Any] = {
            "run_id": "test",
            "rollout_id": "r0",
            "group_id": "g0",
            "problem": {"id": "p0", "question": "1 + 1?", "answer": "2", "reference_solution": "1 + 1 = 2"},
            "policy_version": 0,
            "prompt_token_ids": [5, 6, 7],
            "completion_token_ids": [8, 9, 2],
            "text": "<step_1>1 + 1 = 2</step_1><answer>2</answer>",
            "finish_reason": "stop",
            "sampling": {"max_new_tokens": 64, "seed": 0},
            "behaviour_logprobs": [-0.5, -0.25, -1.5],
        }
        return Rollout.model_validate(fields | overrides)

    return make
