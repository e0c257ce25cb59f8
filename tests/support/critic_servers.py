"""Critic services over real sockets, with backends that tests hold and let go."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from stepalign.client import CriticClient
from stepalign.errors import PromptTooLongError
from stepalign.prompts import Message
from stepalign.types import CriticIdentity, CritiqueRequest, CritiqueResponse, FinishReason
from stepalign_critic.app import AppSettings, create_app
from stepalign_critic.backends.base import Generation, RenderedPrompt
from stepalign_critic.backends.micro_batcher import MicroBatcher, Wanted
from stepalign_critic.errors import EngineError
from stepalign_critic.http.door import Door, DoorSettings
from stepalign_critic.http.server import server_config
from stepalign_critic.metrics import Metrics
from stepalign_critic.service import CriticService
from stepalign_lab.checker import exact_critique

QUESTION = "3 + 4 * 7"
STEP_1, STEP_2, ANSWER = "<step_1> 3 + 4 = 7 </step_1>", "<step_2> 7 * 7 = 9 </step_2>", "<answer> 9 </answer>"
CORRECT = {"question": QUESTION, "attempt": f"{STEP_1} {STEP_2} {ANSWER}", "answer": "9"}


class GatedBackend:
    """Loads until ``load`` is set, generates (one at a time, one waiting) until ``gate`` is set.

    ``patience_seconds`` is how long it waits for either before it fails.
    """

    name = "gated"
    recovers = True

    def __init__(self, patience_seconds: float = 10) -> None:
        self._patience_seconds = patience_seconds
        self.load, self.gate = threading.Event(), threading.Event()
        self.attempts: list[str] = []
        self._batcher = MicroBatcher[str, str](self._copy, max_batch=1, max_queue=1, wait_seconds=0)

    def _copy(self, attempts: list[str], wanted: Wanted) -> list[str]:
        self.attempts += attempts
        assert self.gate.wait(self._patience_seconds)
        return [exact_critique(QUESTION, attempt) for attempt in attempts]

    def identity(self, prompt_version: str) -> CriticIdentity:
        return CriticIdentity(model="m", weights_revision="w", prompt_version=prompt_version, backend=self.name)

    async def start(self) -> None:
        assert await asyncio.to_thread(self.load.wait, self._patience_seconds)
        self._batcher.start()

    def render(self, messages: list[Message]) -> None:
        return None

    async def generate(self, prompt: RenderedPrompt) -> Generation:
        if prompt.request.attempt == "too long":
            raise PromptTooLongError("the critique prompt", 9, 8, "critic.max_prompt_tokens")
        if prompt.request.attempt == "bug":
            raise KeyError("a bug")
        return Generation(await self._batcher.submit(prompt.request.attempt), FinishReason.STOP, 5, 3)

    def expected_wait_seconds(self) -> float | None:
        return self._batcher.expected_wait_seconds()

    def healthy(self) -> bool:
        return self._batcher.running

    async def stop(self) -> None:
        self.load.set()
        self.gate.set()
        await self._batcher.stop()


class HeldBackend:
    """Generates for an attempt once it is released. ``wait`` is the wait that it expects.

    ``held`` are the attempts that it generates for, ``cancelled`` those that were given up.
    """

    name = "held"
    recovers = True

    def __init__(self) -> None:
        self.held: dict[str, asyncio.Event] = {}
        self.cancelled: list[str] = []
        self.wait: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def let_pass(self, attempt: str) -> None:
        """Generate for ``attempt`` at once when it comes."""
        self.held[attempt] = asyncio.Event()
        self.held[attempt].set()

    def release(self, attempt: str) -> None:
        """Called from the test's thread. Waits until the attempt is there."""
        wait_until(lambda: attempt in self.held)
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.held[attempt].set)

    def identity(self, prompt_version: str) -> CriticIdentity:
        return CriticIdentity(model="m", weights_revision="w", prompt_version=prompt_version, backend=self.name)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()

    def render(self, messages: list[Message]) -> None:
        return None

    async def generate(self, prompt: RenderedPrompt) -> Generation:
        attempt = prompt.request.attempt
        assert attempt is not None
        if attempt == "broken":
            raise EngineError("the engine broke")
        released = self.held.setdefault(attempt, asyncio.Event())
        try:
            await released.wait()
        except asyncio.CancelledError:
            self.cancelled.append(attempt)
            raise
        return Generation(exact_critique(QUESTION, attempt), FinishReason.STOP, 5, 3)

    def expected_wait_seconds(self) -> float | None:
        return self.wait

    def healthy(self) -> bool:
        return True

    async def stop(self) -> None:
        for released in self.held.values():
            released.set()


@contextmanager
def serving(
    service: CriticService, settings: AppSettings | None = None, door: DoorSettings | None = None
) -> Iterator[str]:
    metrics = Metrics(service.engine_registry())
    server = uvicorn.Server(
        server_config(create_app(service, settings, metrics), Door(door or DoorSettings(), metrics))
    )
    with socket.create_server(("127.0.0.1", 0)) as listening:
        # As stepalign_critic.process does, and for its reason: else most answers take 40 ms longer.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], Any], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def ask(url: str, request: CritiqueRequest) -> CritiqueResponse:
    async def main() -> CritiqueResponse:
        async with CriticClient(url, timeout=10) as client:
            await client.wait_ready(10)
            return await client.critique(request)

    return asyncio.run(main())


def error_of(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "message", "param", "type"]
    return body["error"]


def metric(url: str, line: str) -> float:
    found = [text for text in httpx.get(f"{url}/metrics").text.splitlines() if text.startswith(f"{line} ")]
    return float(found[0].split()[-1]) if found else 0.0
