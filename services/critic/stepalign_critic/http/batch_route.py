"""``POST /v1/critiques/batch``: many critiques in one request, each with a status of its own.

Items are validated one by one, so that a bad one costs no other. They are answered in the order of the request, or,
with ``Accept: application/x-ndjson``, one per line as soon as each is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, ValidationError, WithJsonSchema
from starlette.types import Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from stepalign.errors import PromptError
from stepalign.types import (
    CritiqueBatchItem,
    CritiqueBatchResponse,
    CritiqueRequest,
    CritiqueResponse,
    ErrorDetail,
    Wire,
)
from stepalign_critic.errors import NotReadyError, ServiceError
from stepalign_critic.http.accept import prefers
from stepalign_critic.http.answering import Answering
from stepalign_critic.http.deadlines import TIMEOUT_PARAMETER, deadline_of
from stepalign_critic.http.envelope import detail_of, error_detail, error_response, invalid_detail, message_of
from stepalign_critic.http.examples import BATCH, BATCH_REQUEST_EXAMPLE, JSON, NDJSON, error_answers
from stepalign_critic.http.hang_up import until_hang_up
from stepalign_run.logging import get_logger

# Documented as a request and read as anything: an invalid item gets an error of its own, in its place.
AnyItem = Annotated[Any, WithJsonSchema({"$ref": "#/components/schemas/CritiqueRequest"})]
Outcome = CritiqueResponse | Exception

_log = get_logger(__name__)


class CritiqueBatchRequest(Wire):
    """The body of a batch."""

    items: Annotated[list[AnyItem], Field(min_length=1)]


# A batch as a whole is never answered with these codes; its items are.
_OF_ITEMS = frozenset({"prompt_too_long", "too_many_steps", "unsupported_request", "prompt_error", "saturated"})
Asked = Annotated[CritiqueBatchRequest, Body(examples=[BATCH_REQUEST_EXAMPLE])]


class Batch:
    """The items of one request. They share a deadline."""

    def __init__(self, answering: Answering, items: Iterable[Any], deadline: float | None) -> None:
        self._answering = answering
        self._deadline = deadline
        self._items = [_read(item) for item in items]

    def refusal(self) -> NotReadyError | None:
        """The reason that no item will be answered. None when some may be, or when one has an error of its own."""
        readable = not any(isinstance(item, Exception) for item in self._items)
        return self._answering.lifecycle.refusal() if readable else None

    async def in_order(self) -> CritiqueBatchResponse:
        """Every item, in the order of the request. Raises NotReadyError when all items were refused with it."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._outcome(index)) for index in range(len(self._items))]
        outcomes = [task.result() for task in tasks]
        refusals = [outcome for outcome in outcomes if isinstance(outcome, NotReadyError)]
        if len(refusals) == len(outcomes) and len({refusal.code for refusal in refusals}) == 1:
            raise refusals[0]
        return CritiqueBatchResponse(items=[_item(index, outcome) for index, outcome in enumerate(outcomes)])

    async def as_completed(self, send: Send) -> None:
        """Send every item as a line of its own, as soon as it is done."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._finished(index)) for index in range(len(self._items))]
            for done in asyncio.as_completed(tasks):
                line = (await done).model_dump_json().encode() + b"\n"
                await send({"type": "http.response.body", "body": line, "more_body": True})

    async def _finished(self, index: int) -> CritiqueBatchItem:
        return _item(index, await self._outcome(index))

    async def _outcome(self, index: int) -> Outcome:
        item = self._items[index]
        if isinstance(item, Exception):
            return item
        with bound_contextvars(item=index):
            try:
                return (await self._answering.answer(item, self._deadline)).response
            except (ServiceError, PromptError) as error:
                return error
            except Exception as error:
                _log.exception("an item failed unexpectedly")
                return error


class _Lines(Response):
    """The items of ``batch`` as lines of JSON, until the client hangs up."""

    media_type = NDJSON

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        # The length is not known before the last item is done.
        del self.headers["content-length"]
        self._batch = batch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await until_hang_up(receive, self._batch.as_completed(send))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def add_batch_route(app: FastAPI, answering: Answering, max_items: int) -> None:
    """Add ``POST /v1/critiques/batch``, which takes at most ``max_items`` items."""

    @app.post(
        "/v1/critiques/batch",
        response_model=CritiqueBatchResponse,
        responses={200: BATCH, **error_answers(400, 401, 408, 413, 415, 422, 500, 503, never=_OF_ITEMS)},
        openapi_extra={"parameters": [TIMEOUT_PARAMETER]},
    )
    async def batch_endpoint(body: Asked, request: Request) -> Response:
        if len(body.items) > max_items:
            said = f"{len(body.items)} items are over the limit of {max_items}; send the rest in another request"
            return error_response(422, said, "invalid_request", param="items")
        batch = Batch(answering, body.items, deadline_of(request))
        refusal = batch.refusal()
        if refusal is not None:
            raise refusal
        if prefers(NDJSON, JSON, request.headers.getlist("accept")):
            return _Lines(batch)
        answered = await until_hang_up(request.receive, batch.in_order())
        return JSONResponse(answered.model_dump(mode="json"))


def _read(item: Any) -> CritiqueRequest | ValidationError:
    try:
        return CritiqueRequest.model_validate(item)
    except ValidationError as error:
        return error


def _item(index: int, outcome: Outcome) -> CritiqueBatchItem:
    if isinstance(outcome, CritiqueResponse):
        return CritiqueBatchItem(index=index, status=HTTPStatus.OK, response=outcome, error=None)
    status, detail = _failed(index, outcome)
    return CritiqueBatchItem(index=index, status=status, response=None, error=detail)


def _failed(index: int, error: Exception) -> tuple[int, ErrorDetail]:
    if isinstance(error, ValidationError):
        return 422, invalid_detail((("items", index, *found["loc"]), message_of(found)) for found in error.errors())
    if isinstance(error, ServiceError | PromptError):
        return detail_of(error)
    return 500, error_detail(500, "the critic failed at this item; its log says why", "internal_error")
