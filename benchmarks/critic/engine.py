"""An engine that always says the same after the same time, and the servers around it.

The critic service has it as its backend, which aligns: the engine finds one step wrong and writes what takes its place.
The peer of every figure is a bare FastAPI route that waits for the same engine. ``asyncio.sleep`` is not exact, so
every answer says how long the engine really took: its number of completion tokens is that time in microseconds.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from stepalign.prompts import Message
from stepalign.types import CriticIdentity, FinishReason
from stepalign_critic.backends.base import Alignment, Generation, RenderedPrompt
from stepalign_critic.decoding.plan import Plan, Score

PATH = "/v1/critiques"
_SURE, _UNLIKELY = -0.01, -4.6
"""Natural-log probabilities of the word that the engine says, and of the other one."""


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
    """``engine`` as a backend of the critic service. It finds ``wrong_step`` (from 1) wrong and all others right.

    Its work besides the engine's, which counts as the service's, is that of every backend which aligns.
    """

    name = "fixed-latency"
    recovers = True
    aligns = True

    def __init__(self, engine: FixedLatencyEngine, wrong_step: int) -> None:
        self._engine = engine
        self._wrong_step = wrong_step

    def identity(self, prompt_version: str) -> CriticIdentity:
        return CriticIdentity(model="fixed", weights_revision="-", prompt_version=prompt_version, backend=self.name)

    async def start(self) -> None:
        return

    def render(self, messages: list[Message]) -> None:
        return None

    async def generate(self, prompt: RenderedPrompt) -> Generation:
        return await self._engine.answer()

    async def align(self, prompt: RenderedPrompt, plan: Plan) -> Alignment:
        made = await self._engine.answer()
        choosing = plan.choose([self._score(step) for step in range(1, len(plan.steps) + 1)])
        plan.remainder(choosing.place, len)
        finished = plan.finish(choosing, made.text)
        return Alignment(finished.text, choosing.p_wrong, finished.forced, made.prompt_tokens, made.completion_tokens)

    def _score(self, step: int) -> Score:
        return Score(_UNLIKELY, (_SURE,)) if step == self._wrong_step else Score(_SURE, (_UNLIKELY,))

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
    """An OpenAI-compatible server that answers at once, as bare ASGI: it must not be the bottleneck.

    Of a message that ``is_wrong`` it says so, any other step it finds right, and it writes ``correction`` where more
    than a word is asked for.
    """

    def __init__(self, is_wrong: Callable[[str], bool], correction: str) -> None:
        self._is_wrong = is_wrong
        self._models = json.dumps({"object": "list", "data": [{"id": "fixed", "object": "model"}]}).encode()
        self._right, self._wrong = _completion("right", "wrong"), _completion("wrong", "right")
        self._correction = _completion(correction)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = bytearray()
        message: Any = {"more_body": True}
        while message.get("more_body", False):
            message = await receive()
            asked += message.get("body", b"")
        body = self._answer(json.loads(asked)) if scope["path"] == "/v1/chat/completions" else self._models
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _answer(self, asked: Any) -> bytes:
        if "logprobs" not in asked:
            return self._correction
        return self._wrong if self._is_wrong(asked["messages"][-1]["content"]) else self._right


def _completion(text: str, other: str | None = None) -> bytes:
    """A chat completion. With ``other`` the text is a word, and the other one was less likely."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if other is not None:
        told = [{"token": text, "logprob": _SURE}, {"token": other, "logprob": _UNLIKELY}]
        choice["logprobs"] = {"content": [{**told[0], "top_logprobs": told}]}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    completion = {"id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": "fixed", "choices": [choice]}
    return json.dumps({**completion, "usage": usage}).encode()
