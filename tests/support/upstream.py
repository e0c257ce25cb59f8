"""A stand-in for a server with OpenAI's protocol that says whatever a test wants it to, byte by byte if need be."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reply:
    """An answer. ``body`` is sent as JSON unless it is bytes; ``raw`` takes the place of all of it.

    ``pieces`` is how many parts the body comes in, ``pause`` the seconds before each.
    """

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict[str, str])
    raw: bytes | None = None
    pieces: int = 1
    pause: float = 0.0

    def parts(self) -> Iterator[bytes]:
        if self.raw is not None:
            yield self.raw
            return
        content = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        named = {"content-type": "application/json", "content-length": str(len(content)), **self.headers}
        yield (
            f"HTTP/1.1 {self.status} Said\r\n".encode()
            + b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in named.items())
            + b"connection: close\r\n\r\n"
        )
        size = max(1, -(-len(content) // self.pieces))
        yield from (content[start : start + size] for start in range(0, len(content), size))


class Upstream:
    """Answers ``/models`` with ``models`` and completions with ``answer(body)``; ``asked`` keeps their bodies.

    ``keys`` are the ``Authorization`` headers that came.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Reply], models: Reply | None = None) -> None:
        self.answer = answer
        self.models = Reply({"data": [{"id": "critic"}]}) if models is None else models
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.closing = threading.Event()

    def reply(self, path: str, headers: dict[str, str], content: bytes) -> Reply:
        self.keys.add(headers.get("authorization"))
        if path.endswith("/models"):
            return self.models
        if not path.endswith("/chat/completions"):
            return Reply({"error": {"message": "no such path"}}, 404)
        body = json.loads(content)
        self.asked.append(body)
        return self.answer(body)


@contextmanager
def upstream(served: Upstream) -> Iterator[str]:
    """Serve it from threads; yields the address with the ``/v1``."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            # The other side may hang up at any time.
            with suppress(OSError):
                self._handle()

        def _handle(self) -> None:
            line = self.rfile.readline().decode("latin-1").split()
            headers: dict[str, str] = {}
            while (said := self.rfile.readline().decode("latin-1").strip()) != "":
                name, _, value = said.partition(":")
                headers[name.lower()] = value.strip()
            if len(line) != 3:
                return
            reply = served.reply(line[1], headers, self.rfile.read(int(headers.get("content-length", "0"))))
            for part in reply.parts():
                if reply.pause and served.closing.wait(reply.pause):
                    return
                self.wfile.write(part)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True
        request_queue_size = 64

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            served.closing.set()
            server.shutdown()
            thread.join(5)
    assert not thread.is_alive()


def completion(text: Any, finish_reason: Any = "stop", **fields: Any) -> dict[str, Any]:
    """A chat completion; ``fields`` take the place of its own or are added."""
    return {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
        **fields,
    }


def events(*chunks: Any, end: str = "data: [DONE]\n\n") -> bytes:
    """The body of a stream."""
    return (": begun\n\n" + "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end).encode()
