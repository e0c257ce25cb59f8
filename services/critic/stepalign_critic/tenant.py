"""The caller of the request in progress. It keeps cached answers and prompts of one API key from another's."""

from __future__ import annotations

import hashlib
from contextvars import ContextVar

_key_digest: ContextVar[str | None] = ContextVar("key_digest", default=None)


def set_key(key: str) -> None:
    """Note the API key of the request that this task answers."""
    _key_digest.set(hashlib.sha256(b"stepalign caller " + key.encode(errors="surrogateescape")).hexdigest()[:32])


def caller() -> str | None:
    """A digest of the request's API key, which does not give the key away; None where the service asks for none."""
    return _key_digest.get()
