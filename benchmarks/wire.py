"""HTTP/1.1 over one kept connection and blocking sockets.

A full client spends a millisecond or more on each request, with a spread far above the differences measured here.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from http.client import HTTPConnection
from types import TracebackType
from typing import Any, Self

from benchmarks.errors import BenchError

CRITIC_PORT = 8300
_CHUNK = 65536


@dataclass(frozen=True)
class Answer:
    """``head`` holds the status line and the headers in lower case, where they were read."""

    status: int
    body: bytes
    head: bytes = b""


def request_bytes(method: str, path: str, api_key: str | None = None, body: bytes = b"") -> bytes:
    """A request that is ready to be sent any number of times."""
    headers = [f"{method} {path} HTTP/1.1", "host: critic", f"content-length: {len(body)}"]
    if body:
        headers.append("content-type: application/json")
    if api_key is not None:
        headers.append(f"authorization: Bearer {api_key}")
    return "\r\n".join([*headers, "", ""]).encode() + body


class Connection:
    """One connection, one request at a time. Raises BenchError on an answer that is no HTTP with a content-length."""

    def __init__(self, address: str, port: int = CRITIC_PORT, timeout: float = 30.0) -> None:
        self._socket = socket.create_connection((address, port), timeout=timeout)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peer = f"{address}:{port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()

    def exchange(self, request: bytes) -> Answer:
        """Send a request and read its whole answer."""
        self._socket.sendall(request)
        received = b""
        while (end := received.find(b"\r\n\r\n")) < 0:
            received += self._read()
        head = received[:end].lower()
        missing = end + 4 + self._length(head) - len(received)
        while missing > 0:
            more = self._read()
            received += more
            missing -= len(more)
        return Answer(int(head[9:12]), received[end + 4 :], head)

    def _length(self, head: bytes) -> int:
        _, found, rest = head.partition(b"\r\ncontent-length:")
        if not found:
            raise BenchError(f"{self._peer} answered without a content-length: {head!r}")
        return int(rest.partition(b"\r\n")[0])

    def _read(self) -> bytes:
        data = self._socket.recv(_CHUNK)
        if not data:
            raise BenchError(f"{self._peer} closed the connection before it answered")
        return data


def fetch(address: str, path: str, api_key: str | None = None, port: int = CRITIC_PORT) -> Answer:
    """One GET that is not timed, by a client that knows all of HTTP. Raises OSError while nobody listens."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key is not None else {}
    connection = HTTPConnection(address, port, timeout=5.0)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return Answer(response.status, response.read())
    finally:
        connection.close()


def expect_critique(answer: Answer) -> dict[str, Any]:
    """The answer's JSON. Raises BenchError unless it holds a critique."""
    if answer.status != 200:
        raise BenchError(f"a critique was answered with {answer.status}: {answer.body[:300]!r}")
    content: dict[str, Any] = json.loads(answer.body)
    if content["critique"] is None:
        raise BenchError(f"the critic did not align its critique: {content['failure']}")
    return content
