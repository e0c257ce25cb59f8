"""Bodies: JSON in UTF-8 as it is, or an answer that names the place and what to change."""

from __future__ import annotations

import json
import sys
from codecs import BOM_UTF8
from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

JSON = "application/json"
_FORM = "application/x-www-form-urlencoded"
_GZIP = b"\x1f\x8b"
_UTF_16_OR_32 = (b"\xff\xfe", b"\xfe\xff")
_MOST_SHOWN_CHARACTERS = 100


class UnreadBodyError(HTTPException):
    """A body that is not read. ``param`` is the header that says so, if one does."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        accepted = {"content-type": {"accept-post": JSON}, "content-encoding": {"accept-encoding": "identity"}}
        super().__init__(status, message, accepted.get(param or ""))
        self.code = code
        self.param = param


class JsonRoute(APIRoute):
    """A route that reads its body by the rules of this module.

    An endpoint with a body takes ``body`` and ``request`` and nothing else, and answers with a response. FastAPI's own
    handler can do more, which takes it a sixth of a request's time.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        field, endpoint = self.body_field, self.endpoint
        if field is None:
            return super().get_route_handler()

        async def read_and_answer(request: Request) -> Response:
            body = await request.body()
            if not body:
                raise _unread("the body is empty; send a JSON object")
            check_headers(request.headers)
            asked, problems = field.validate(read_json(body), loc=("body",))
            if problems:
                raise RequestValidationError(problems)
            return await endpoint(body=asked, request=request)

        return read_and_answer


def check_headers(headers: Headers) -> None:
    """Raises UnreadBodyError (415) unless the body is declared as JSON in UTF-8 as it is."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        said = f"the header Content-Encoding: {_shown(encoding)} is not read; send the body as it is, uncompressed"
        raise _unsupported(said, "content-encoding")
    given = headers.get("content-type", "")
    if given == JSON:
        return
    declared = Message()
    declared["content-type"] = given
    kind = declared.get_content_type() if given else ""
    if kind != JSON and not (kind.startswith("application/") and kind.endswith("+json")):
        hint = ", as curl -d does by itself" if kind == _FORM else ""
        said = f"send JSON with the header Content-Type: {JSON}; {_shown(given) or 'no such header'} was sent{hint}"
        raise _unsupported(said, "content-type")
    charset = str(declared.get_param("charset", "utf-8")).lower()
    if charset not in ("utf-8", "utf8", "us-ascii", "ascii"):
        said = f"JSON is read as UTF-8, and the header Content-Type names {_shown(charset)}; encode the body as UTF-8"
        raise _unsupported(said, "content-type")


def read_json(body: bytes) -> Any:
    """The value of a body. Raises UnreadBodyError (400) that says where it is none."""
    if body.startswith(_GZIP):
        raise _unread("the body is compressed with gzip; send it as it is")
    if body.startswith(_UTF_16_OR_32) or b"\x00" in body[:4]:
        raise _unread("the body is UTF-16 or UTF-32; encode it as UTF-8")
    try:
        # Some programs put a byte order mark before UTF-8 too.
        return _DECODER.decode(body.removeprefix(BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        said = f"the body is no UTF-8: byte 0x{byte:02x} at position {error.start}; encode it as UTF-8, not as Latin-1"
    except json.JSONDecodeError as error:
        said = f"the body is no JSON: {error.msg} at character {error.pos} (line {error.lineno}, column {error.colno})"
    except RecursionError:
        said = "arrays and objects of the body are nested too deeply; those of a request are three levels deep"
    except ValueError:
        # The only one that is left: Python reads no integers of thousands of digits.
        most = sys.get_int_max_str_digits()
        said = f"the body has an integer of over {most} digits, which no field takes; send fewer, or a string"
    raise _unread(said)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _unread(f"the key {_shown(twice)!r} is twice in one object of the body; send it once")
    return read


def _refuse_constant(name: str) -> Any:
    raise _unread(f"the body holds {name}, which is no JSON; send null, or leave the field out")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _unread(message: str) -> UnreadBodyError:
    return UnreadBodyError(400, message, "invalid_json")


def _unsupported(message: str, header: str) -> UnreadBodyError:
    return UnreadBodyError(415, message, "unsupported_media_type", header)


def _shown(text: str) -> str:
    return text[:_MOST_SHOWN_CHARACTERS]
