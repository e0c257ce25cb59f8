"""Requests that are refused by their head alone: too many headers, or no connection left for them."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepalign_critic.http.access import OPEN_PATHS
from stepalign_critic.http.door import IS_SPARE, TOO_MANY
from stepalign_critic.http.envelope import error_response
from stepalign_critic.http.middleware import answer_unread

MAX_HEADERS = 256
_CHECKS = ("GET", "HEAD")
_CLOSE = {"connection": "close"}


class RefuseByHead:
    """Answers 431 to more than ``MAX_HEADERS`` headers, and 503 to all but health on a connection over the limit.

    After a check of health such a connection is closed, since its next request may be another. So is one that a client
    wanted for a tunnel (CONNECT): what it sends next is no HTTP.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await answer_unread(refusal, receive, send)
        elif IS_SPARE in scope.get("state", ()) or scope["method"] == "CONNECT":
            await self._app(scope, receive, _closing(send))
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        count = len(scope["headers"])
        if count > MAX_HEADERS:
            said = f"{count} headers are over the limit of {MAX_HEADERS}"
            return error_response(431, said, "headers_too_large", headers=_CLOSE)
        checks = scope["method"] in _CHECKS and scope["path"] in OPEN_PATHS
        if IS_SPARE in scope.get("state", ()) and not checks:
            headers = {"retry-after": "1", **_CLOSE}
            return error_response(503, TOO_MANY, "too_many_connections", headers=headers)
        return None


def _closing(send: Send) -> Send:
    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["connection"] = "close"
        await send(message)

    return closing
