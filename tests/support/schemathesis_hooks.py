"""Schemathesis' hooks: the rules of the critic that its schema cannot say."""

from __future__ import annotations

import schemathesis
from schemathesis.specs.openapi.checks import negative_data_rejection

from stepalign.types import CritiqueBatchItem


def items_of(response: schemathesis.Response) -> list[CritiqueBatchItem]:
    """The items of a batch's answer, as lines or not; none in other answers."""
    if response.status_code != 200:
        return []
    if response.headers["content-type"] == ["application/x-ndjson"]:
        return [CritiqueBatchItem.model_validate_json(line) for line in response.content.splitlines()]
    return [CritiqueBatchItem.model_validate(item) for item in response.json().get("items", [])]


@schemathesis.check
def items_are_as_declared(
    _: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """Lines of JSON too: schemathesis compares a body with one schema only."""
    if case.path == "/v1/critiques/batch":
        items_of(response)


@schemathesis.check
def negative_data_or_item_rejection(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> bool | None:
    """``negative_data_rejection``, where an item that got a 422 of its own counts as rejected."""
    if case.path == "/v1/critiques/batch" and any(item.status == 422 for item in items_of(response)):
        return None
    return negative_data_rejection(ctx, response, case)
