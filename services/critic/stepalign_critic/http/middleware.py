"""Middleware in plain ASGI: request ids and the request counter, and the limit on bodies."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from secrets import token_hex

import structlog
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepalign_critic.http.envelope import error_response
from stepalign_critic.lifecycle import Lifecycle
from stepalign_critic.metrics import Metrics
from stepalign_run.logging import get_logger

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:/@+-]{1,200}")
_HUNG_UP = 499
LINGER_SECONDS = 2.0
MOST_DISCARDED_BYTES = 8 * 2**20

_log = get_logger(__name__)


class RequestContext:
    """Gives every request an id, taken from ``X-Request-Id`` or made, on its answer and on every log line.

    Counts the request under ``path`` when that is one of ``paths``, else under ``other``. An error that no handler
    knows is logged and becomes a 500. A process that will end soon asks its clients to connect anew.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str], lifecycle: Lifecycle) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{token_hex(16)}"
        bound = structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            await self._answer(request_id, scope, receive, send)
        finally:
            structlog.contextvars.reset_contextvars(**bound)

    async def _answer(self, request_id: str, scope: Scope, receive: Receive, send: Send) -> None:
        status = _HUNG_UP

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                if self._lifecycle.leaving:
                    headers = [*(each for each in headers if each[0] != b"connection"), (b"connection", b"close")]
                message["headers"] = headers
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = _HUNG_UP
            _log.info("the client hung up")
        except Exception:
            _log.exception("a request failed unexpectedly")
            if status != _HUNG_UP:
                raise
            await error_response(500, "the critic failed; its log says why", "internal_error")(
                scope, receive, send_with_id
            )
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.count_request(path, status)


class BodyLimit:
    """Answers 413 to a body over ``max_bytes``, by its declared length or as soon as it has grown over the limit.

    Answers 408 to a body that is incomplete after ``seconds``: half a request would else keep the process from ending.
    The body of a GET or HEAD means nothing and is not waited for.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        body = None
        if not declared.isdecimal() or int(declared) <= self._max_bytes:
            try:
                async with asyncio.timeout(self._seconds):
                    body = await self._read(receive)
            except TimeoutError:
                said = f"the body was not complete after {self._seconds:g} s"
                late = error_response(408, said, "body_too_slow", headers={"connection": "close"})
                await late(scope, receive, send)
                return
        if body is None:
            await self._refuse(scope, receive, send)
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body, or None as soon as it is over the limit."""
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                return None
            more = message.get("more_body", False)
        return bytes(body)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = error_response(
            413,
            f"the body is over the limit of {self._max_bytes} bytes",
            "body_too_large",
            headers={"connection": "close"},
        )
        await answer_unread(response, receive, send)


async def answer_unread(response: Response, receive: Receive, send: Send) -> None:
    """Answer without having read the body, which is read and thrown away behind the answer, up to a limit.

    Closing on a client that still writes resets the connection, and the client would never see the answer.
    """
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": bytes(response.body), "more_body": True})
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            discarded = 0
            while discarded < MOST_DISCARDED_BYTES:
                message = await receive()
                discarded += len(message.get("body", b""))
                if not message.get("more_body", False):
                    break
    await send({"type": "http.response.body", "body": b"", "more_body": False})
