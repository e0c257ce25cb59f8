"""The door around httptools, which parses all that it is given at once, and keeps the headers of trailers too.

Where a client offers another protocol (``Upgrade: h2c``, as ``curl --http2`` and Java's client do), httptools stops
before the body, and uvicorn goes on without it. Here such a request is parsed again without its offer. CONNECT always
stops it, and is answered as a request without a body.

httptools parses several short requests at once. uvicorn then tells only the last of them that its client hung up; here
the one that is being answered is told too.
"""

from __future__ import annotations

from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from stepalign_critic.http.door import Door, GuardedConnection


class GuardedHttpTools(GuardedConnection, HttpToolsProtocol):  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
    """A connection that httptools reads."""

    def __init__(self, door: Door, *arguments: Any, **named: Any) -> None:
        super().__init__(door, *arguments, **named)
        self._body_comes = False
        self._upgrade_offered = False
        self._answering: RequestResponseCycle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def _in_body(self) -> bool:
        return self._body_comes

    def _answers_others(self) -> bool:
        return bool(self.pipeline) or (self._unanswered() and not self._body_comes)

    def _parse(self, part: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(part)
        except httptools.HttpParserUpgrade as upgrade:
            if self.parser.get_method() != b"CONNECT":
                self._pass_over_upgrade(part[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("")

    def _pass_over_upgrade(self, rest: bytes) -> None:
        start = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        kept = [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        self._upgrade_offered = False
        self.parser = httptools.HttpRequestParser(self)
        # As uvicorn makes its own: else nothing may follow a request that asks for the connection's end.
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._parse(b"\r\n".join([start, *kept, b"", rest]))

    def _malformed(self, error: BaseException | None) -> tuple[int, str, str]:
        if isinstance(error, httptools.HttpParserCallbackError):
            # It says no more than that; of the calls from the parser only the one that reads the URL can fail.
            error = error.__context__
        return super()._malformed(error)

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers come after all decisions that headers are for.
        if not self._body_comes:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            # What it names is a host, of which the parser of URLs makes nothing.
            self.url = self.url if self.url.startswith(b"/") else b"/" + self.url
        elif self.parser.should_upgrade():
            self._upgrade_offered = True
            return
        super().on_headers_complete()
        self._advanced = self._body_comes = True

    def on_body(self, body: bytes) -> None:
        self._advanced = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._upgrade_offered:
            return
        self._advanced, self._body_comes = True, False
        super().on_message_complete()
