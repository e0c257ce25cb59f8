"""Browsers: which pages of other origins may ask the service (``critic.cors_origins``)."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from stepalign.types import REQUEST_TIMEOUT_HEADER
from stepalign_critic.http.envelope import error_response
from stepalign_critic.http.examples import CACHE_HEADER

_SENT = ("authorization", "content-type", "x-request-id", REQUEST_TIMEOUT_HEADER)
_SHOWN = ("allow", "retry-after", "www-authenticate", "x-request-id", CACHE_HEADER)


class Cors(CORSMiddleware):
    """Starlette's middleware with the service's methods and headers. A refused preflight has the envelope too."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST", "OPTIONS"),
            allow_headers=_SENT,
            expose_headers=_SHOWN,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        said = f"{bytes(response.body).decode()}; critic.cors_origins names the origins that may ask"
        kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        return error_response(response.status_code, said, "cors_refused", headers=kept)
