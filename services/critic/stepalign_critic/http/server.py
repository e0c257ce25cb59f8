"""uvicorn with the door of this service (:mod:`stepalign_critic.http.door`)."""

from __future__ import annotations

import functools
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.http.h11_impl import H11Protocol

from stepalign_critic.http.door import Door, GuardedConnection


def server_config(app: ASGIApp, door: Door, **further: Any) -> uvicorn.Config:
    """The settings of a server whose connections come through ``door``."""
    connection: Any = functools.partial(_guarded(), door)
    return uvicorn.Config(
        app,
        http=connection,
        # A WebSocket would leave the door, and there is none to talk to.
        ws="none",
        # Nothing here asks who the client is.
        proxy_headers=False,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_keep_alive=door.settings.keep_alive_seconds,
        h11_max_incomplete_event_size=door.settings.max_head_bytes,
        **further,
    )


def _guarded() -> type[GuardedConnection]:
    """The door around the parser that uvicorn takes: httptools where it is installed."""
    if AutoHTTPProtocol is H11Protocol:
        from stepalign_critic.http.door_h11 import GuardedH11

        return GuardedH11
    from stepalign_critic.http.door_httptools import GuardedHttpTools

    return GuardedHttpTools
