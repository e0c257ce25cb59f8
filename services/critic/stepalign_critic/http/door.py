"""The door of the service: what a client may do before it has sent a request, and how many may be inside.

uvicorn limits neither the bytes nor the time of a request's head, and its answers to what is no HTTP are no JSON. A
connection of ours is uvicorn's own with limits around its parser, whichever that is; it counts bytes and time as long
as it waits for its client. The answers that it gives by itself have the envelope of all others.

Over ``max_connections`` a new connection takes the place of the one that has waited longest for its client: for a
request, or for the rest of one. While all of them are being answered, a few more are let in for checks of health, and
requests for anything else get 503.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from enum import Enum, auto
from http import HTTPStatus
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from stepalign_critic.http.envelope import error_response
from stepalign_critic.http.joined_writes import JoinedWrites
from stepalign_critic.http.middleware import LINGER_SECONDS, MOST_DISCARDED_BYTES
from stepalign_critic.metrics import Metrics
from stepalign_run.logging import get_logger

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol as _Connection
else:
    _Connection = object

SPARE_CONNECTIONS = 16
"""Connections over the limit that are let in for checks of health."""
IS_SPARE = "stepalign_spare_connection"
"""The key of ``scope["state"]`` that such a connection's requests have."""
TOO_MANY = "all connections of this critic are in use; try again later or raise critic.max_connections"
# What a parser gets at a time, so that little is parsed beyond a limit or beyond the request that is to be answered.
_SLICE_BYTES = 4096
_MOST_REASON_CHARACTERS = 200
# By their first bytes.
_OTHER_PROTOCOLS = {
    b"\x16\x03": "this port speaks plain HTTP and got a TLS handshake; use http://, or put a proxy with TLS in front",
    b"PRI * HTTP/2": "this port speaks HTTP/1.1 and got HTTP/2; let the client use HTTP/1.1",
}

_log = get_logger(__name__)


@dataclass(frozen=True)
class DoorSettings:
    """Limits of a connection."""

    max_connections: int = 768
    keep_alive_seconds: int = 90
    """How long a connection without a request stays open."""
    max_head_bytes: int = 64 * 1024
    """Request line and headers; as many bytes may lie between two pieces of a chunked body, and be trailers."""
    head_seconds: float = 20.0
    """How long a client may take to send them, and to send the rest of a body that no answer waits for."""
    unread_seconds: float = 60.0
    """How long an answer may wait for a client that does not read."""


class Admission(Enum):
    """What becomes of a new connection."""

    INSIDE = auto()
    SPARE = auto()
    REFUSED = auto()


class Door:
    """The connections of a server."""

    def __init__(self, settings: DoorSettings, metrics: Metrics) -> None:
        self.settings = settings
        self._metrics = metrics
        self._open: set[GuardedConnection] = set()
        # In the order in which they began to wait for their clients.
        self._waiting: dict[GuardedConnection, None] = {}
        metrics.connections.set_function(lambda: len(self._open))

    def admit(self, connection: GuardedConnection) -> Admission:
        """Find a place for a new connection; one that waits for its client may lose its own."""
        if len(self._open) >= self.settings.max_connections and self._waiting:
            longest = next(iter(self._waiting))
            self.forget(longest)
            longest.close()
        over = len(self._open) - self.settings.max_connections
        if over >= SPARE_CONNECTIONS:
            return Admission.REFUSED
        self._open.add(connection)
        return Admission.SPARE if over >= 0 else Admission.INSIDE

    def waits(self, connection: GuardedConnection) -> None:
        """Note that a connection waits for its client."""
        if connection in self._open:
            self._waiting.setdefault(connection)

    def answers(self, connection: GuardedConnection) -> None:
        """Note that a connection has a whole request, which is to be answered."""
        self._waiting.pop(connection, None)

    def forget(self, connection: GuardedConnection) -> None:
        """Note that a connection is gone."""
        self._open.discard(connection)
        self._waiting.pop(connection, None)

    def count_refusal(self, status: int) -> None:
        """Count an answer to what never became a request."""
        self._metrics.count_request("other", status)


class GuardedConnection(_Connection):
    """A connection with limits; a base beside one of uvicorn's protocols, before it.

    It hands on what has come in slices. Bytes that end neither a head nor a message and are no body are counted: they
    are all that a parser keeps. While a whole request is unanswered, what follows it is held back.
    """

    door: Door
    # Set by a subclass when the parser has come to the end of a head or a message, or to a piece of a body.
    _advanced = False

    def __init__(self, door: Door, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.door = door
        self._held = b""
        self._run = 0
        self._line_ended = False
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._later: tuple[int, str, str] | None = None
        self._awaited: Any = None
        self._refused = False
        self._discarded = 0

    # What a subclass knows of its parser.

    def _in_body(self) -> bool:
        """Whether the head of a message has come and its end has not."""
        raise NotImplementedError

    def _answers_others(self) -> bool:
        """Whether requests are unanswered that came whole, before what comes now."""
        raise NotImplementedError

    # What uvicorn and the event loop call.

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(JoinedWrites(transport, self.loop))  # pyright: ignore[reportArgumentType]
        transport = self.transport
        admission = self.door.admit(self)
        if admission is Admission.REFUSED:
            self._answer(503, TOO_MANY, "too_many_connections")
            transport.close()
            return
        if admission is Admission.SPARE:
            self.app_state = {**self.app_state, IS_SPARE: True}
        self.door.waits(self)
        self._deadline = self.loop.call_later(self.door.settings.head_seconds, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self.door.forget(self)
        self._no_deadline()
        self._is_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self._discard(len(data))
            return
        self._held += data
        self._feed()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._later is not None and not self._answers_others():
            self._refuse(*self._later)
        elif not self.transport.is_closing():
            self._feed()

    def send_400_response(self, msg: str) -> None:
        self._refuse(*self._malformed(sys.exception()))

    def shutdown(self) -> None:
        if self._refused:
            self.transport.close()
        else:
            super().shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.door.settings.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._is_read()

    def _unsupported_upgrade_warning(self) -> None:
        """An upgrade that is not made is no event: the request is answered by HTTP/1.1, as its client expects."""

    # What comes in.

    def _feed(self) -> None:
        held, fed = self._held, 0
        while fed < len(held) and not self._holds():
            room = min(_SLICE_BYTES, self.door.settings.max_head_bytes - self._run)
            if room <= 0:
                self._refuse(*self._too_large())
                return
            self._take(held[fed : fed + room])
            if self._refused:
                return
            fed += room
        self._held = held[fed:]
        if len(self._held) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        self._settle()

    def _take(self, part: bytes) -> None:
        if not self._run:
            self._line_ended = False
            if part.startswith(tuple(_OTHER_PROTOCOLS)):
                said = next(said for start, said in _OTHER_PROTOCOLS.items() if part.startswith(start))
                self._refuse(400, said, "invalid_request")
                return
        self._advanced = False
        self._parse(part)
        if self._advanced:
            self._run = 0
        else:
            self._run += len(part)
            self._line_ended = self._line_ended or b"\n" in part

    def _parse(self, part: bytes) -> None:
        super().data_received(part)

    def _unanswered(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _holds(self) -> bool:
        return self._later is not None or (self._unanswered() and not self._in_body())

    # The time that it may take.

    def _settle(self) -> None:
        if self._refused or self.transport.is_closing():
            return
        if self._unanswered():
            self._no_deadline()
            if not self._in_body():
                self.door.answers(self)
            elif self._awaited is not self.cycle:
                # Its body is waited for from now on, however long the connection was idle before.
                self._awaited = self.cycle
                self.door.answers(self)
                self.door.waits(self)
            return
        self.door.waits(self)
        if not self._run and not self._in_body():
            # Between two requests uvicorn's own limit holds.
            self._no_deadline()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.door.settings.head_seconds, self._too_slow)

    def _too_slow(self) -> None:
        self._deadline = None
        if self._run and not self._in_body():
            seconds = self.door.settings.head_seconds
            self._refuse(408, f"the headers were not complete after {seconds:g} s", "headers_too_slow")
        else:
            self.transport.close()

    def _no_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _is_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    # Answers without a request.

    def _too_large(self) -> tuple[int, str, str]:
        limit = self.door.settings.max_head_bytes
        if self._in_body() or self._unanswered():
            said = f"over {limit} bytes of chunk extensions or trailers; leave them out"
            return 431, said, "headers_too_large"
        if not self._line_ended:
            said = f"the request line is over the limit of {limit} bytes; requests to this service need no long URL"
            return 414, said, "uri_too_long"
        return 431, f"request line and headers are over the limit of {limit} bytes", "headers_too_large"

    def _malformed(self, error: BaseException | None) -> tuple[int, str, str]:
        """The answer to what the parser has refused with ``error``."""
        said = f"the request is no valid HTTP: {str(error)[:_MOST_REASON_CHARACTERS]}"
        return 400, said, "invalid_request"

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer and close. Closing at once on a client that still writes would take the answer from it."""
        if self._answers_others():
            self._later = (status, message, code)
            return
        self._refused, self._held = True, b""
        self._no_deadline()
        self._unset_keepalive_if_required()
        begun = False
        if self._unanswered():
            begun = self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if begun or not self.transport.can_write_eof():
            self.transport.close()
            return
        self._answer(status, message, code)
        self.transport.write_eof()
        self.flow.resume_reading()
        self.door.waits(self)
        self._deadline = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _answer(self, status: int, message: str, code: str) -> None:
        request_id = f"req_{token_hex(16)}"
        headers = {"connection": "close", "x-request-id": request_id}
        if status == 503:
            headers["retry-after"] = "1"
        response = error_response(status, message, code, headers=headers)
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()]
        lines += [name + b": " + value for name, value in response.raw_headers]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        self.door.count_refusal(status)
        _log.info("refused without a request", status=status, code=code, reason=message, request_id=request_id)

    def _discard(self, count: int) -> None:
        self._discarded += count
        if self._discarded > MOST_DISCARDED_BYTES:
            self.transport.close()

    def close(self) -> None:
        """End a connection that waits for its client."""
        self.transport.close()
