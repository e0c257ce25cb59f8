"""The door around h11, which stops by itself at the end of a request and limits what lies between pieces of a body."""

from __future__ import annotations

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from stepalign_critic.http.door import GuardedConnection


class GuardedH11(GuardedConnection, H11Protocol):
    """A connection that h11 reads."""

    def _in_body(self) -> bool:
        return self.conn.their_state is h11.SEND_BODY

    def _answers_others(self) -> bool:
        return False

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        self._advanced = self.cycle is not before or self.conn.their_state is not h11.IDLE

    def _malformed(self, error: BaseException | None) -> tuple[int, str, str]:
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            return self._too_large()
        return super()._malformed(error)
