"""An engine that always gives the same critique after the same time, and the servers around it.

The critic service has it as its backend; the peer of every figure is a bare FastAPI route that waits for the same
engine. ``asyncio.sleep`` is not exact, so every answer says how long the engine really took: its number of completion
tokens is that time in microseconds.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from stepalign.prompts import Message
from stepalign.types import CriticIdentity, FinishReason
from stepalign_critic.backends.base import Generation, RenderedPrompt

PATH = "/v1/critiques"


class FixedLatencyEngine:
    """Answers ``text`` after ``seconds``, any number of requests at a time. 0 seconds only let others have a turn."""

    def __init__(self, text: str, seconds: float) -> None:
        self._text = text
        self._seconds = seconds

    async def answer(self) -> Generation:
        begin = time.perf_counter_ns()
        await asyncio.sleep(self._seconds)
        microseconds = (time.perf_counter_ns() - begin) // 1000
        return Generation(self._text, FinishReason.STOP, prompt_tokens=0, completion_tokens=microseconds)


class FixedLatencyBackend:
    """``engine`` as a backend of the critic service."""

    name = "fixed-latency"
    recovers = True

    def __init__(self, engine: FixedLatencyEngine) -> None:
        self._engine = engine

    def identity(self, prompt_version: str) -> CriticIdentity:
        return CriticIdentity(model="fixed", weights_revision="-", prompt_version=prompt_version, backend=self.name)

    async def start(self) -> None:
        return

    def render(self, messages: list[Message]) -> None:
        return None

    async def generate(self, prompt: RenderedPrompt) -> Generation:
        return await self._engine.answer()

    def expected_wait_seconds(self) -> None:
        return None

    def healthy(self) -> bool:
        return True

    async def stop(self) -> None:
        return


class Asked(BaseModel):
    """The request of the bare route: the fields of a critique request that the measurements send."""

    question: str
    attempt: str
    reference_solution: str | None = None
    answer: str | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int


class Answered(BaseModel):
    """The answer of the bare route: the engine's text as it is."""

    text: str
    finish_reason: str
    usage: Usage


def bare_app(engine: FixedLatencyEngine) -> FastAPI:
    """The least that somebody would write around ``engine``: a pydantic model in, JSON out, nothing checked."""
    app = FastAPI()

    @app.post(PATH)
    async def answer(asked: Asked) -> Answered:
        made = await engine.answer()
        usage = Usage(prompt_tokens=made.prompt_tokens, completion_tokens=made.completion_tokens)
        return Answered(text=made.text, finish_reason=made.finish_reason, usage=usage)

    return app


class ModelServer:
    """An OpenAI-compatible server that always gives ``completion``, as bare ASGI: it must not be the bottleneck."""

    def __init__(self, models: bytes, completion: bytes) -> None:
        self._models = models
        self._completion = completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message: Any = {"more_body": True}
        while message.get("more_body", False):
            message = await receive()
        body = self._completion if scope["path"] == "/v1/chat/completions" else self._models
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
