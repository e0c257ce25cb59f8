"""An OpenAI-compatible server around the lab's critic model, over a real socket."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from stepalign.types import CritiqueRequest, FinishReason
from stepalign_critic.backends.base import Backend, RenderedPrompt


class OpenAIServer:
    """Serves ``backend`` as ``models``. ``reply`` is sent instead of an answer when it is set; ``asked`` keeps the
    requests, ``gone`` counts clients that hung up."""

    def __init__(self, backend: Backend, models: tuple[str, ...] = ("critic",), key: str | None = None) -> None:
        self.backend = backend
        self.models = models
        self.key = key
        self.asked: list[dict[str, Any]] = []
        self.reply: Response | None = None
        self.hold = threading.Event()
        self.hold.set()
        self.gone = 0
        self.models_status = 200
        self.app = self._app()

    def _app(self) -> FastAPI:
        @asynccontextmanager
        async def lifespan(_: FastAPI) -> Any:
            await self.backend.start()
            yield
            await self.backend.stop()

        app = FastAPI(lifespan=lifespan)

        @app.get("/v1/models")
        async def models(request: Request) -> Response:
            if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
                return JSONResponse({"error": {"message": "wrong key"}}, 401)
            return JSONResponse({"data": [{"id": name} for name in self.models]}, self.models_status)

        @app.post("/v1/chat/completions")
        async def completions(request: Request) -> Response:
            body = await request.json()
            self.asked.append(body)
            while not self.hold.is_set():
                if await request.is_disconnected():
                    self.gone += 1
                    return Response(status_code=499)
                await asyncio.sleep(0.01)
            if self.reply is not None:
                return self.reply
            messages = body["messages"]
            prompt = RenderedPrompt(CritiqueRequest(question="-", attempt=""), messages, self.backend.render(messages))
            made = await self.backend.generate(prompt)
            return JSONResponse(chat_completion(made.text, made.finish_reason, made.prompt_tokens))

        return app


def chat_completion(text: str, finish_reason: str = FinishReason.STOP, prompt_tokens: int = 3) -> dict[str, Any]:
    return {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": str(finish_reason)}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 2},
    }


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Serve ``app`` from a thread; yields its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(15)
    assert not thread.is_alive()
