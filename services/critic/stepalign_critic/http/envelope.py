"""The error envelope ``{"error": {"message", "type", "code", "param"}}``, the same for every error of the service."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi.responses import JSONResponse

from stepalign.errors import PromptError, PromptTooLongError
from stepalign.types import ErrorBody, ErrorDetail
from stepalign_critic.errors import ServiceError


def error_response(
    status: int, message: str, code: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error answer. ``param`` is the dotted path of the offending field, if one field is to blame."""
    return enveloped(status, error_detail(status, message, code, param), headers)


def enveloped(status: int, detail: ErrorDetail, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An answer that holds ``detail``."""
    return JSONResponse(ErrorBody(error=detail).model_dump(), status_code=status, headers=headers)


def error_detail(status: int, message: str, code: str, param: str | None = None) -> ErrorDetail:
    """The content of an envelope; the type follows from the status."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return ErrorDetail(message=_sendable(message), type=kind, code=code, param=param and _sendable(param))


def message_of(found: Mapping[str, Any]) -> str:
    """What one of pydantic's problems is, in words that say what to change."""
    if found["type"] == "string_unicode":
        return "a key or a text has half of a surrogate pair; send whole characters"
    return found["msg"]


def _sendable(text: str) -> str:
    """The text without lone surrogates, which a client may have sent as a key and no answer can hold."""
    return text.encode(errors="backslashreplace").decode()


def detail_of(error: ServiceError | PromptError) -> tuple[int, ErrorDetail]:
    """Status and detail of a request that got no critique."""
    if isinstance(error, ServiceError):
        status, code = error.status, error.code
    elif isinstance(error, PromptTooLongError):
        status, code = 422, "prompt_too_long"
    else:
        status, code = 500, "prompt_error"
    return status, error_detail(status, str(error), code)


def invalid_detail(problems: Iterable[tuple[tuple[Any, ...], str]]) -> ErrorDetail:
    """The detail (422) of an invalid body: paths with their problems, of which the first becomes ``param``.

    An empty path stands for the body as a whole.
    """
    # The prefix is pydantic's, before a validator's own message.
    named = [(".".join(map(str, path)) or None, said.removeprefix("Value error, ")) for path, said in problems]
    message = "; ".join(f"{field or 'body'}: {problem}" for field, problem in named)
    return error_detail(422, message, "invalid_request", named[0][0])
