"""Access: with API keys every path but health needs one; without keys only this machine can reach the service."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from stepalign.errors import ConfigError
from stepalign.secret_files import read_secrets
from stepalign_critic.http.envelope import error_response
from stepalign_critic.http.middleware import answer_unread
from stepalign_critic.tenant import set_key

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})


class ApiKeys:
    """The accepted keys. Only their SHA-256 digests are kept; a key is compared with all of them in constant time."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def from_file(cls, path: Path) -> ApiKeys:
        """The keys of a file, one a line. Raises ConfigError when it cannot be read or holds no key."""
        return cls(read_secrets("critic.api_keys_file", path))

    def accepts(self, key: str) -> bool:
        """Whether ``key`` is one of the keys."""
        digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)


class RequireApiKey:
    """Answers 401 to a request without an accepted ``Authorization: Bearer`` key, before its body is read."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._keys.accepts(key.strip()):
            set_key(key.strip())
            await self._app(scope, receive, send)
            return
        said = "send your API key as Authorization: Bearer <key>" if not key else "this API key is not accepted"
        response = error_response(401, said, "invalid_api_key", headers={"www-authenticate": "Bearer"})
        await answer_unread(response, receive, send)


def check_exposure(host: str, keys: ApiKeys | None) -> None:
    """Refuse a ``host`` that others can reach when there are no keys. Raises ConfigError."""
    if keys is None and not is_loopback(host):
        raise ConfigError(
            f"critic.host is {host!r} and there are no API keys: set critic.api_keys_file to a file with one key a "
            "line, or listen on a loopback address such as 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether ``host`` is ``localhost`` or a loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
