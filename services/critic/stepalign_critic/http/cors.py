"""Browsers: which pages of other origins may ask the service (``critic.cors_origins``).

Two middlewares share the work of Starlette's one. The headers of answers are set outside all others, since a page
reads errors too. Preflights are answered inside: they have ids, are counted and may be refused by their head, but need
no key.
"""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from stepalign.types import REQUEST_TIMEOUT_HEADER
from stepalign_critic.http.envelope import error_response
from stepalign_critic.http.examples import CACHE_HEADER

_SENT = ("authorization", "content-type", "x-request-id", REQUEST_TIMEOUT_HEADER)
_SHOWN = ("allow", "retry-after", "www-authenticate", "x-request-id", CACHE_HEADER)
_MOST_SHOWN_CHARACTERS = 200


class CorsHeaders(CORSMiddleware):
    """Sets the headers by which a browser lets a page read an answer."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(app, allow_origins=origins, expose_headers=_SHOWN)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self.simple_response(scope, receive, send, request_headers=Headers(scope=scope))
        else:
            await self.app(scope, receive, send)


class Preflights(CORSMiddleware):
    """Answers preflights with the service's methods and headers. A refusal says, in the envelope, what it refuses."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(
            app, allow_origins=origins, allow_methods=("GET", "HEAD", "POST", "OPTIONS"), allow_headers=_SENT
        )

    async def simple_response(self, scope: Scope, receive: Receive, send: Send, request_headers: Headers) -> None:
        await self.app(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        said = "; ".join(self._refusals(request_headers))
        return error_response(response.status_code, said, "cors_refused", headers=kept)

    def _refusals(self, asked: Headers) -> list[str]:
        origin, method = asked["origin"], asked["access-control-request-method"]
        listed = asked.get("access-control-request-headers")
        names = [] if listed is None else [name.strip().lower() for name in listed.split(",")]
        others = [name for name in names if name not in self.allow_headers]
        said: list[str] = []
        if not self.is_allowed_origin(origin):
            said.append(f"pages of {_shown(origin)} may not ask; critic.cors_origins names the origins that may")
        if method not in self.allow_methods:
            said.append(f"pages may not use {_shown(method)}; {', '.join(self.allow_methods)} are allowed")
        if others:
            allowed = ", ".join(self.allow_headers)
            said.append(f"pages may not send the headers {_shown(', '.join(others))!r}; allowed are {allowed}")
        if "access-control-request-private-network" in asked:
            said.append("pages may not reach this service from outside its network; open them from inside")
        return said


def _shown(text: str) -> str:
    return text[:_MOST_SHOWN_CHARACTERS]
