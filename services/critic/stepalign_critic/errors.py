"""The errors that become HTTP answers. Each class fixes its status and code; the message names the remedy.

An *answer* of the model that does not align is no error: it is a 200 with ``failure``.
"""

from __future__ import annotations

import os
from typing import ClassVar, Self

from stepalign.errors import StepalignError


class BackendDiedError(StepalignError):
    """The backend has stopped working for good, and its process ends: a supervisor may start another one."""

    exit_code = os.EX_TEMPFAIL


class ServiceError(StepalignError):
    """Base: a request that got no answer from the critic. ``retry_after`` is when to ask again, in seconds."""

    status: ClassVar[int] = 500
    code: str = "internal_error"

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        self.retry_after = retry_after
        super().__init__(message)

    def extended(self, said: str) -> Self:
        """The same error for one request, with ``said`` behind its message. A batch's error is that of others too."""
        told = type(self).__new__(type(self))
        told.__dict__.update(self.__dict__)
        told.args = (f"{self}; {said}",)
        return told


class SaturatedError(ServiceError):
    """Too many requests wait already; the client should come back."""

    status = 503
    code = "saturated"


class NotReadyError(ServiceError):
    """The process is loading, draining or broken. ``code`` says which."""

    status = 503

    def __init__(self, message: str, code: str) -> None:
        self.code = code
        super().__init__(message)


class EngineError(ServiceError):
    """The backend failed while it generated; every request of the batch gets this."""

    status = 502
    code = "engine_error"


class EngineTimeoutError(ServiceError):
    """The backend took longer than it may for one answer. Asked again at once it would take as long again."""

    status = 504
    code = "engine_timeout"


class RateLimitedError(ServiceError):
    """This caller asks for more than its share, and may come back after ``retry_after``."""

    status = 429
    code = "rate_limited"


class UnsupportedRequestError(ServiceError):
    """The backend cannot handle this request, now or later."""

    status = 422
    code = "unsupported_request"


class TooManyStepsError(ServiceError):
    """The attempt has more steps than the service takes."""

    status = 422
    code = "too_many_steps"


class BudgetTooSmallError(ServiceError):
    """The critique cannot fit ``critic.max_new_tokens``: its copies and the least that is to be written are longer."""

    status = 422
    code = "budget_too_small"


class DeadlineExceededError(ServiceError):
    """The client's deadline passed; its work was given up."""

    status = 504
    code = "deadline_exceeded"


class DeadlineUnreachableError(ServiceError):
    """The wait alone would outlast the client's deadline; no work was begun."""

    status = 504
    code = "deadline_unreachable"
