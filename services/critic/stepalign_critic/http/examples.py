"""The answers in the OpenAPI document: an example of each, and the errors by their status.

A test compares the examples with the service.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from stepalign.types import ErrorBody
from stepalign_critic.http.envelope import error_detail
from stepalign_critic.http.json_body import JSON

NDJSON = "application/x-ndjson"
DocumentedAnswers = dict[int | str, dict[str, Any]]
"""An answer of the document by its status."""

ATTEMPT = (
    "<step_1>5 boxes hold 5 * 6 = 30 eggs.</step_1> "
    "<step_2>Without the broken ones that is 30 - 4 = 24 eggs.</step_2> "
    "<step_3>Half of them are left: 24 / 2 = 12 eggs.</step_3> <answer>12</answer>"
)
REQUEST_EXAMPLE: dict[str, Any] = {
    "question": "5 boxes hold 6 eggs each. 4 eggs break, and half of the others are sold. How many eggs are left?",
    "attempt": ATTEMPT,
    "reference_solution": "There are 30 eggs at first, 26 without the broken ones, and half of 26 is 13.",
    "answer": "13",
}
_CONTEXT = (
    "<step_1>5 boxes hold 5 * 6 = 30 eggs.</step_1> "
    "<step_2>Without the broken ones that is 30 - 4 = 26 eggs.</step_2> "
    "<step_3>Half of them are left: 26 / 2 = 13 eggs.</step_3> <answer>13</answer>"
)
_IDENTITY = {
    "weights_revision": "5c2f0e8a91d3b764",
    "prompt_version": "chat-v1",
    "backend": "transformers",
    "settings": "0b61e7f2c49d8a35",
}
RESPONSE_EXAMPLE: dict[str, Any] = {
    "id": "crq_5f0c9a3f8e1b4d6f9c2a7b1e0d3c4a58",
    "attempt": {
        "rule": "tags",
        "steps": [[0, 46], [47, 113], [114, 171]],
        "answer": [172, 191],
        "answer_rule": "tag",
        "tagged": None,
    },
    "critique": {
        "schema_version": 1,
        "verdict": "incorrect",
        "first_error_step": 2,
        "answer_is_wrong": False,
        "steps": [
            {"number": 1, "body": "5 boxes hold 5 * 6 = 30 eggs.", "status": "copied", "attempt_step": 1},
            {
                "number": 2,
                "body": "Without the broken ones that is 30 - 4 = 26 eggs.",
                "status": "corrected",
                "attempt_step": 2,
            },
            {
                "number": 3,
                "body": "Half of them are left: 26 / 2 = 13 eggs.",
                "status": "continued",
                "attempt_step": None,
            },
        ],
        "answer": "13",
        "alignment": {"copied_steps": 1, "whitespace_differences": 0, "first_difference": [47, 113]},
        "text": _CONTEXT,
    },
    "failure": None,
    "context": _CONTEXT,
    "retried": None,
    "p_wrong": None,
    "forced": [],
    "critic": {"model": "critic-4b", **_IDENTITY},
    "usage": {"prompt_tokens": 1268, "completion_tokens": 112},
}
_ERRORS: dict[int, tuple[str, list[tuple[str, str, str | None]]]] = {
    400: (
        "The body is no JSON in UTF-8.",
        [("invalid_json", "the body is no JSON: Expecting value at character 13 (line 1, column 14)", None)],
    ),
    401: (
        "With API keys: no accepted key was sent.",
        [("invalid_api_key", "send your API key as Authorization: Bearer <key>", None)],
    ),
    408: (
        "The body was not complete in time.",
        [("body_too_slow", "the body was not complete after 20 s", None)],
    ),
    413: ("The body is over the limit.", [("body_too_large", "the body is over the limit of 131072 bytes", None)]),
    415: (
        "The body is not declared as JSON, or is compressed.",
        [
            (
                "unsupported_media_type",
                "send JSON with the header Content-Type: application/json; text/plain was sent",
                "content-type",
            )
        ],
    ),
    422: (
        "This request will never be answered.",
        [
            ("invalid_request", "question: Field required", "question"),
            (
                "prompt_too_long",
                "the critique prompt has 9001 tokens, over its budget of 8192; raise critic.max_prompt_tokens or leave "
                "it out",
                None,
            ),
            (
                "too_many_steps",
                "the attempt has 1200 steps by the rule 'lines', the limit is 1000; send fewer, longer ones, or mark "
                "the steps with tags",
                None,
            ),
            ("unsupported_request", "the checker 'lab' cannot handle this request: no expression", None),
        ],
    ),
    429: (
        "This API key asks for more than its share; come back after Retry-After.",
        [("rate_limited", "this caller may ask for 600 critiques a minute; come back in 0.1 s", None)],
    ),
    500: (
        "The service failed.",
        [
            ("internal_error", "the critic failed; its log says why", None),
            ("prompt_error", "the chat template cannot render the prompt", None),
        ],
    ),
    502: (
        "The engine failed while it generated.",
        [("engine_error", "the critic's engine failed: RuntimeError: out of memory", None)],
    ),
    503: (
        "No requests are taken now; come back after Retry-After.",
        [
            ("loading", "the critic's backend is loading", None),
            ("saturated", "256 requests wait already; try again later", None),
            ("draining", "the critic is draining: it will end soon", None),
            ("stopping", "the critic is stopping: it finishes what it has and ends", None),
            ("failed", "the critic's backend failed: no space left", None),
            ("unhealthy", "the critic's backend stopped working", None),
        ],
    ),
    504: (
        "There was no answer before the deadline of X-Request-Timeout-Ms, or in the time that the engine has for one.",
        [
            ("deadline_exceeded", "the deadline of X-Request-Timeout-Ms passed before the answer", None),
            (
                "deadline_unreachable",
                "the wait is about 12.5 s, and 5.0 s remain; allow more time or try again later",
                None,
            ),
            (
                "engine_timeout",
                "the model's server gave no answer in 600 s; where that is too short for its queue and the longest "
                "critique, raise critic.openai.timeout_seconds or lower critic.max_new_tokens",
                None,
            ),
        ],
    ),
}
_RETRY_AFTER = {
    "Retry-After": {"description": "Seconds.", "required": True, "schema": {"type": "integer", "example": 1}}
}
_SOMETIMES_RETRY_AFTER = {"Retry-After": {**_RETRY_AFTER["Retry-After"], "required": False}}
_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"required": True, "schema": {"type": "string", "example": "Bearer"}}},
    429: _RETRY_AFTER,
    502: _SOMETIMES_RETRY_AFTER,
    503: _RETRY_AFTER,
    504: _SOMETIMES_RETRY_AFTER,
}
CACHE_HEADER = "x-stepalign-cache"


def error_answers(*statuses: int, never: Collection[str] = ()) -> DocumentedAnswers:
    """The error answers of an endpoint, each with an example for every code of its status but those of ``never``."""
    return {status: _error(status, never) for status in statuses}


def _error(status: int, never: Collection[str]) -> dict[str, Any]:
    description, cases = _ERRORS[status]
    examples = {
        code: {"value": ErrorBody(error=error_detail(status, message, code, param)).model_dump()}
        for code, message, param in cases
        if code not in never
    }
    answer = {"model": ErrorBody, "description": description, "content": {JSON: {"examples": examples}}}
    return {**answer, "headers": _HEADERS[status]} if status in _HEADERS else answer


def answered(description: str, example: Any) -> dict[str, Any]:
    """A 200 with an example of its body."""
    return {"description": description, "content": {JSON: {"example": example}}}


_BATCH_ITEMS: list[dict[str, Any]] = [
    {"index": 0, "status": 200, "response": RESPONSE_EXAMPLE, "error": None},
    {
        "index": 1,
        "status": 422,
        "response": None,
        "error": error_detail(
            422, "items.1.question: Field required", "invalid_request", "items.1.question"
        ).model_dump(),
    },
]
CRITIQUE = {
    **answered("A critique, or a typed failure in its place.", RESPONSE_EXAMPLE),
    "headers": {
        CACHE_HEADER: {
            "description": "Where the answer came from: made now, kept in this process, in the store that replicas "
            "share, or made for another request that asked for the same.",
            "required": True,
            "schema": {"type": "string", "enum": ["miss", "hit", "shared", "joined"]},
        }
    },
}
BATCH_REQUEST_EXAMPLE: dict[str, Any] = {"items": [REQUEST_EXAMPLE, {"attempt": ATTEMPT}]}
BATCH: dict[str, Any] = {
    "description": "Every item with a status of its own, in the order of the request; as lines, in that of completion.",
    "content": {
        JSON: {"example": {"items": _BATCH_ITEMS}},
        NDJSON: {
            "schema": {"$ref": "#/components/schemas/CritiqueBatchItem"},
            "example": "".join(f"{json.dumps(item)}\n" for item in reversed(_BATCH_ITEMS)),
        },
    },
}
MODELS = answered(
    "The model that makes the critiques.",
    {
        "object": "list",
        "data": [
            {"id": "critic-4b", "object": "model", "created": 1767225600, "owned_by": "stepalign", **_IDENTITY},
        ],
    },
)
LIVE = answered("The process serves.", {"status": "live"})
READY = answered("Requests should be sent here.", {"status": "ready"})
METRICS_TEXT: dict[str, Any] = {
    "description": "Metrics in Prometheus' text format. With API keys they are at critic.metrics_port instead.",
    "content": {"text/plain": {"schema": {"type": "string"}, "example": "stepalign_critic_in_flight 3.0\n"}},
}
VERSION = answered(
    "Versions; the critic is null until its backend has started.",
    {"version": "0.1.0", "schema_version": 1, "critic": RESPONSE_EXAMPLE["critic"]},
)


_API_KEY = "api_key"
_SECURITY_SCHEMES = {_API_KEY: {"type": "http", "scheme": "bearer", "description": "A line of critic.api_keys_file."}}


class DocumentedApp(FastAPI):
    """An app that documents its examples unchanged: FastAPI drops every null, those of examples too.

    A route that declares a 401 takes an API key, and with ``keys`` asks for one.
    """

    def __init__(self, *, keys: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self._keys = keys

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        document["components"]["securitySchemes"] = _SECURITY_SCHEMES
        for route in self.routes:
            if isinstance(route, APIRoute):
                for method in route.methods or ():
                    operation = document["paths"][route.path][method.lower()]
                    _restore_examples(operation["responses"], route.responses)
                    if "401" in operation["responses"]:
                        operation["security"] = [{_API_KEY: []}] if self._keys else [{_API_KEY: []}, {}]
        return document


def _restore_examples(documented: dict[str, Any], given: DocumentedAnswers) -> None:
    for status, answer in given.items():
        for kind, content in answer["content"].items():
            documented[str(status)]["content"][kind].update(content)
