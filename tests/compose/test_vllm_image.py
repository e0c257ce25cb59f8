"""The critic's image with vLLM's CPU build, asked through the load balancer. `make test-images` alone runs this."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import httpx
import pytest

pytestmark = [pytest.mark.images, pytest.mark.timeout(3600)]

BUILD_SECONDS, START_SECONDS = 3000, 600
UP = "docker compose --profile vllm-cpu up -d --build --wait"


class Stack(Protocol):
    """What conftest.py gives."""

    url: str
    environment: dict[str, str]

    def run(self, *command: str, timeout: float = 300, check: bool = True) -> str: ...
    def manual_says(self, command: str, timeout: float = 300) -> str: ...
    def logs(self, service: str) -> str: ...


@pytest.fixture
def key(vllm_stack: Stack) -> Iterator[str]:
    try:
        vllm_stack.manual_says(UP, timeout=BUILD_SECONDS + START_SECONDS)
    except AssertionError as error:
        error.add_note(vllm_stack.logs("critic-vllm-cpu")[-6000:])
        raise
    yield vllm_stack.run("make", "-s", "key").strip()


def test_it_is_ready_and_critiques_with_vllm(vllm_stack: Stack, key: str) -> None:
    assert httpx.get(f"{vllm_stack.url}/health/ready").json() == {"status": "ready"}
    attempt = "3 * 4 = 12\n2 + 12 = 15\n#### 15"
    body: dict[str, Any] = {"question": "What is 2 + 3 * 4?", "attempt": attempt, "answer": "14"}
    headers = {"authorization": f"Bearer {key}"}
    answer = httpx.post(f"{vllm_stack.url}/v1/critiques", json=body, headers=headers, timeout=START_SECONDS)
    assert answer.status_code == 200, answer.text + vllm_stack.logs("critic-vllm-cpu")[-6000:]
    found = answer.json()
    # Aligned decoding: no critique fails for its form, and each step has a probability.
    assert found["critique"]["answer"] == "14" and found["failure"] is None
    assert len(found["p_wrong"]) == 2
    assert found["critic"]["backend"] == "vllm" and found["usage"]["completion_tokens"] > 0
