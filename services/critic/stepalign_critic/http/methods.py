"""The methods of each path: HEAD wherever GET is, and OPTIONS."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send


class Allowed:
    """The methods that ``routes`` allow."""

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        by_path: dict[str, set[str]] = {}
        for route in routes:
            if isinstance(route, Route):
                methods = by_path.setdefault(route.path, {"OPTIONS"})
                methods |= route.methods or set()
                methods |= {"HEAD"} if "GET" in methods else set()
        self._by_path = {path: ", ".join(sorted(methods)) for path, methods in by_path.items()}
        self._readable = frozenset(path for path, methods in by_path.items() if "GET" in methods)

    def header(self, path: str) -> str | None:
        """The value of ``Allow``; None where there is nothing."""
        return self._by_path.get(path)

    def reads(self, path: str) -> bool:
        """Whether ``path`` has a GET."""
        return path in self._readable


class Methods:
    """Answers a HEAD as the GET, whose body the server leaves out, and OPTIONS with what is allowed."""

    def __init__(self, app: ASGIApp, allowed: Allowed) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            method, path = scope["method"], scope["path"]
            if method == "HEAD" and self._allowed.reads(path):
                # A copy: by the server's own scope it knows that this is a HEAD.
                scope = {**scope, "method": "GET"}
            elif method == "OPTIONS" and (header := self._allowed.header(path)) is not None:
                await Response(status_code=204, headers={"allow": header})(scope, receive, send)
                return
        await self._app(scope, receive, send)
